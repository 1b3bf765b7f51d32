"""Quantised arrays: small values with one float32 scale for each block of the last two axes.

| form | values | block | bytes for 128 weights |
| --- | --- | --- | --- |
| fp8 | float8_e4m3fn | 128 x 128, the release's | 128 |
| int8 | -127 to 127 | 1 x 128 | 132 |
| int4 | -7 to 7, two in a byte | 1 x 128 | 68 |

Real weight = value * scale. The last block of an axis may be partial; leading axes (experts) are
stacked.
"""

from __future__ import annotations

import dataclasses
import types
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped, UInt8

from step3_jax.layout.tensor import scale_shape

FP8 = jnp.float8_e4m3fn
FP8_MAX = float(jnp.finfo(FP8).max)
INT8_MAX, INT4_MAX = 127, 7
# Columns that share a scale in the integer forms, and columns of a unit of packed int4 values (see `PackedInt4`).
GROUP = 128
INT4_UNIT = 32

Form = Literal["fp8", "int8", "int4"]


if TYPE_CHECKING:
    Leaf = Array
else:
    # Shapes replace arrays where a program is compiled without weights.
    Leaf = Array | jax.ShapeDtypeStruct


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockScaled:
    """A quantised array.

    Attributes:
      values: FP8 or int8 values [..., out, in].
      scales: Float32 scales [..., ceil(out/rows), ceil(in/columns)].
      block: Rows and columns that share one scale.
    """

    values: Shaped[Leaf, "*lead rows columns"]
    scales: Float[Leaf, "*lead row_blocks column_blocks"]
    block: tuple[int, int] = dataclasses.field(default=(128, 128), metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def __getitem__(self, index: types.EllipsisType) -> BlockScaled:
        """`array[...]` is the array itself: `nnx.Param` reads its value like this."""
        if index is not ...:
            raise ValueError(f"a block-scaled array takes no index but [...]; {index!r} was given")
        return self


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedInt4:
    """A quantised array with two values per byte.

    A unit of 16 bytes holds 32 columns: byte j has column j in its low and column 16 + j in its high half, each as value
    + 8. So 16 bytes widen to two runs of neighbouring columns. Columns after the last one are zeros (8 in each half).

    Attributes:
      values: [..., out, ceil(in/32) * 16].
      scales: Float32 scales [..., out, ceil(in/128)].
      num_columns: in.
    """

    values: UInt8[Array, "*lead rows bytes"]
    scales: Float[Array, "*lead rows groups"]
    num_columns: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.values.shape[:-1], self.num_columns)

    def __getitem__(self, index: types.EllipsisType) -> PackedInt4:
        """`array[...]` is the array itself: `nnx.Param` reads its value like this."""
        if index is not ...:
            raise ValueError(f"a quantised array takes no index but [...]; {index!r} was given")
        return self


Quantised = BlockScaled | PackedInt4


def quantise(
    array: Float[Array, "*lead rows columns"], form: Form = "fp8", *, block: tuple[int, int] | None = None
) -> BlockScaled | PackedInt4:
    """Quantises: scale = max|block| / largest value (1 for a block of zeros), values rounded to nearest even.

    Args:
      array: Weights, the last two axes are cut in blocks.
      form: Form of the values.
      block: Rows and columns of a block; by default the form's, see above, the only one for int4.

    Returns:
      The quantised array; `dequantise` is its inverse up to rounding.

    Raises:
      ValueError: For an array of fewer than two axes, or another block for int4.
    """
    if form == "int4" and block not in (None, (1, GROUP)):
        raise ValueError(f"block is {block}; int4 values have a scale for each row and {GROUP} columns")
    if block is None:
        block = (128, 128) if form == "fp8" else (1, GROUP)
    array = array.astype(jnp.float32)
    largest = _block_maxima(array, block)
    most = {"fp8": FP8_MAX, "int8": INT8_MAX, "int4": INT4_MAX}[form]
    # A divisor that XLA cannot know: for a constant it would multiply by the reciprocal, and the last bit may differ.
    scales = largest / jnp.where(largest > 0, most, 1.0)
    scales = jnp.where(scales > 0, scales, 1.0)
    scaled = array / expand_scales(scales, array.shape, block)
    if form == "fp8":
        return BlockScaled(scaled.astype(FP8), scales, block)
    # If a scale is subnormal, a quotient may exceed the largest value.
    whole = jnp.clip(jnp.round(scaled), -most, most).astype(jnp.int8)
    return BlockScaled(whole, scales, block) if form == "int8" else PackedInt4(_pack(whole), scales, array.shape[-1])


def dequantise(
    array: BlockScaled | PackedInt4, dtype: jax.typing.DTypeLike = jnp.float32
) -> Float[Array, "*lead rows columns"]:
    """Value * scale, multiplied in float32, then cast to `dtype`."""
    if isinstance(array, PackedInt4):
        values, block = _unpack(array), (1, GROUP)
    else:
        values, block = array.values, array.block
    scales = expand_scales(array.scales, array.shape, block)
    return (values.astype(jnp.float32) * scales).astype(dtype)


def _block_maxima(
    array: Float[Array, "*lead rows columns"], block: tuple[int, int]
) -> Float[Array, "*lead row_blocks column_blocks"]:
    """The largest absolute value of each block.

    Raises:
      ValueError: For an array of fewer than two axes.
    """
    blocks_shape = scale_shape(array.shape, block)
    pad = [(0, 0)] * (array.ndim - 2) + [
        (0, count * size - length)
        for count, size, length in zip(blocks_shape[-2:], block, array.shape[-2:], strict=True)
    ]
    lead, (row_blocks, column_blocks) = blocks_shape[:-2], blocks_shape[-2:]
    blocked = jnp.pad(array, pad).reshape(*lead, row_blocks, block[0], column_blocks, block[1])
    return jnp.max(jnp.abs(blocked), axis=(-3, -1))


def expand_scales(
    scales: Float[Array, "*lead row_blocks column_blocks"], shape: tuple[int, ...], block: tuple[int, int]
) -> Float[Array, "*lead rows columns"]:
    """One scale for each element of an array of `shape`; partial last blocks are cut off."""
    rows = jnp.repeat(scales, block[0], axis=-2)[..., : shape[-2], :]
    return jnp.repeat(rows, block[1], axis=-1)[..., : shape[-1]]


def _pack(values: Shaped[Array, "*lead rows columns"]) -> UInt8[Array, "*lead rows bytes"]:
    """Whole numbers from -7 to 7 in the packing of `PackedInt4`."""
    pad = [(0, 0)] * (values.ndim - 1) + [(0, -values.shape[-1] % INT4_UNIT)]
    halves = (jnp.pad(values, pad) + 8).astype(jnp.uint8).reshape(*values.shape[:-1], -1, 2, INT4_UNIT // 2)
    return (halves[..., 0, :] | halves[..., 1, :] << 4).reshape(*values.shape[:-1], -1)


def _unpack(array: PackedInt4) -> Shaped[Array, "*lead rows columns"]:
    """The inverse of `_pack`, int8."""
    lead = array.values.shape[:-1]
    units = array.values.reshape(*lead, -1, 1, INT4_UNIT // 2)
    halves = jnp.concatenate([units & 15, units >> 4], axis=-2).reshape(*lead, -1)
    return halves[..., : array.num_columns].astype(jnp.int8) - 8
