"""Block-scaled FP8 arrays: values in `float8_e4m3fn` with one float32 scale for each block of the last two axes.

The layout is the released one (spec, section 3): real weight = value * scale, blocks of 128 x 128, the last block of an
axis may be partial, leading axes (experts) are stacked in front.
"""

from __future__ import annotations

import dataclasses
import types

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from step3_jax.layout.tensor import scale_shape

FP8 = jnp.float8_e4m3fn
FP8_MAX = float(jnp.finfo(FP8).max)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockScaled:
    """A quantised array.

    Attributes:
      values: FP8 values [..., out, in].
      scales: Float32 scales [..., ceil(out/rows), ceil(in/columns)].
      block: Rows and columns that share one scale.
    """

    values: Float[Array, "*lead rows columns"]
    scales: Float[Array, "*lead row_blocks column_blocks"]
    block: tuple[int, int] = dataclasses.field(default=(128, 128), metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def __getitem__(self, index: types.EllipsisType) -> BlockScaled:
        """`array[...]` is the array itself: so reads `nnx.Param` its value."""
        if index is not ...:
            raise ValueError(f"a block-scaled array takes no index but [...]; {index!r} was given")
        return self


def quantise(array: Float[Array, "*lead rows columns"], block: tuple[int, int] = (128, 128)) -> BlockScaled:
    """Quantises to FP8: scale = max|block| / 448 (1 for a block of zeros), values rounded to nearest even.

    Args:
      array: Weights, the last two axes are cut in blocks.
      block: Rows and columns of a block.

    Returns:
      The quantised array; `dequantise` is its inverse up to rounding.

    Raises:
      ValueError: For an array of fewer than two axes.
    """
    blocks_shape = scale_shape(array.shape, block)
    array = array.astype(jnp.float32)
    pad = [(0, 0)] * (array.ndim - 2) + [
        (0, count * size - length)
        for count, size, length in zip(blocks_shape[-2:], block, array.shape[-2:], strict=True)
    ]
    lead, (row_blocks, column_blocks) = blocks_shape[:-2], blocks_shape[-2:]
    blocked = jnp.pad(array, pad).reshape(*lead, row_blocks, block[0], column_blocks, block[1])
    largest = jnp.max(jnp.abs(blocked), axis=(-3, -1))
    # A divisor that XLA cannot know: by a constant it multiplies with the reciprocal, and the last bit may differ.
    scales = largest / jnp.where(largest > 0, FP8_MAX, 1.0)
    scales = jnp.where(scales > 0, scales, 1.0)
    values = (array / expand_scales(scales, array.shape, block)).astype(FP8)
    return BlockScaled(values, scales, block)


def dequantise(array: BlockScaled, dtype: jax.typing.DTypeLike = jnp.float32) -> Float[Array, "*lead rows columns"]:
    """Value * scale, multiplied in float32, then cast to `dtype`."""
    scales = expand_scales(array.scales, array.shape, array.block)
    return (array.values.astype(jnp.float32) * scales).astype(dtype)


def expand_scales(
    scales: Float[Array, "*lead row_blocks column_blocks"], shape: tuple[int, ...], block: tuple[int, int]
) -> Float[Array, "*lead rows columns"]:
    """One scale for each element of an array of `shape`; partial last blocks are cut off."""
    rows = jnp.repeat(scales, block[0], axis=-2)[..., : shape[-2], :]
    return jnp.repeat(rows, block[1], axis=-1)[..., : shape[-1]]
