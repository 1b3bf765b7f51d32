"""The options of a conversion. Nothing here imports jax."""

from __future__ import annotations

# Names of --dtype, and the name in config.json. With FP8, the other weights are BF16, as in the release.
CONFIG_DTYPES = {"bf16": "bfloat16", "fp8": "bfloat16", "float32": "float32"}
DTYPE_CHOICES = tuple(CONFIG_DTYPES)
FORMS = ("orbax", "hf")
# Most memory of a conversion by default, without mapped files.
MAX_MEMORY = 4 * 2**30
