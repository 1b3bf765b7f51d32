"""The forms of linear weights, the options for them, and their bytes. Nothing here needs a device.

| form | values | scales, float32 |
| --- | --- | --- |
| float32, bfloat16 | as named | none |
| fp8 | E4M3, one byte | one for each block of 128 x 128 (the checkpoint's block) |
| int8 | one byte | one for each row and 128 columns |
| int4 | half a byte, rows in units of 32 columns | one for each row and 128 columns |
"""

from __future__ import annotations

import math

from step3_jax.layout.tensor import scale_shape

# Options at load: "stored" keeps weights as in the file, "none" widens them to the dtype of activations.
QUANTIZATIONS = ("auto", "none", "stored", "fp8", "int8", "int4")
# How a CPU gets its weights: "auto" copies them.
LOAD_FORMATS = ("auto", "mmap")
# Forms that a deployment may have its linear weights in.
WEIGHTS = ("float32", "bfloat16", "fp8", "int8", "int4")
# Forms that only the CPU kernels multiply.
CPU_FORMS = ("int8", "int4")
# Columns that share a scale in the integer forms.
GROUP_COLUMNS = 128
_VALUE_BYTES = {"float32": 4, "bfloat16": 2, "fp8": 1, "int8": 1}
_INT4_UNIT_COLUMNS, _INT4_UNIT_BYTES = 32, 16
_SCALE_BYTES = 4


def block_of(form: str, fp8_block: tuple[int, int] = (128, 128)) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None for a form without scales."""
    if form in CPU_FORMS:
        return (1, GROUP_COLUMNS)
    return fp8_block if form == "fp8" else None


def form_bytes(shape: tuple[int, ...], form: str, fp8_block: tuple[int, int] = (128, 128)) -> int:
    """Bytes of a tensor in a form, including its scales.

    Args:
      shape: Shape of the tensor; the last two axes are rows and columns.
      form: One of `WEIGHTS`.
      fp8_block: Rows and columns that share a scale in FP8.
    """
    block = block_of(form, fp8_block)
    if form == "int4":
        values = math.prod(shape[:-1]) * -(-shape[-1] // _INT4_UNIT_COLUMNS) * _INT4_UNIT_BYTES
    else:
        values = math.prod(shape) * _VALUE_BYTES[form]
    return values if block is None else values + _SCALE_BYTES * math.prod(scale_shape(shape, block))
