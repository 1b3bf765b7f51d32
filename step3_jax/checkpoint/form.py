"""What a conversion may be asked for. Nothing here imports jax."""

from __future__ import annotations

# Names of --dtype, and the name in config.json. FP8 has BF16 beside it, as the release does.
CONFIG_DTYPES = {"bf16": "bfloat16", "fp8": "bfloat16", "float32": "float32"}
DTYPE_CHOICES = tuple(CONFIG_DTYPES)
FORMS = ("orbax", "hf")
# Most memory of a conversion, mapped files not counted, if nothing else is asked for.
MAX_MEMORY = 4 * 2**30
