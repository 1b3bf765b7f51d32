"""FP8 activations: e4m3 values with one float32 scale for each 128 columns of a row (1 x 128 blocks)."""

from __future__ import annotations

from typing import Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.storage import BLOCK

FP8 = jnp.float8_e4m3fn
FP8_MAX = 448.0

# "rows": [M, K/128], as in the formulas. "columns": [K/128, M rounded up to 4], the transpose: rows of at least 16
# bytes, from which the tensor-core kernels copy. Its producers (a norm, SwiGLU) can write it at no cost.
ScalesLayout = Literal["rows", "columns"]


def quantise_rows(
    x: Float[Array, "M K"], *, scales_layout: ScalesLayout = "rows"
) -> tuple[Float[Array, "M K"], Float[Array, "scale_rows scale_columns"]]:
    """Quantises each 1 x 128 block: scale = max|block| / 448 (1 for a block of zeros), values rounded to nearest even.

    Args:
      x: Any float dtype; computed in float32. The last block of a row may be partial.
      scales_layout: See `ScalesLayout`.

    Returns:
      e4m3 values and float32 scales, [M, ceil(K/128)] or, as "columns", [ceil(K/128), ceil(M/4) * 4], where
      entries past M are 1.

    Raises:
      ValueError: For an unknown layout.
    """
    check_layout(scales_layout)
    m, k = x.shape
    wide = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, -k % BLOCK))).reshape(m, -1, BLOCK)
    largest = jnp.max(jnp.abs(wide), axis=-1)
    scales = jnp.where(largest > 0, largest / FP8_MAX, 1.0)
    # A quotient may round to just above the largest value, which e4m3 would turn into NaN.
    scaled = jnp.clip(wide / scales[..., None], -FP8_MAX, FP8_MAX)
    values = scaled.reshape(m, -1)[:, :k].astype(FP8)
    return values, scales if scales_layout == "rows" else scales_to_columns(scales)


def scales_to_columns(scales: Float[Array, "M blocks"]) -> Float[Array, "blocks padded_M"]:
    """Converts scales from the "rows" layout to "columns"."""
    return jnp.pad(scales.T, ((0, 0), (0, -scales.shape[0] % 4)), constant_values=1.0)


def scales_to_rows(scales: Float[Array, "blocks padded_M"], num_rows: int) -> Float[Array, "M blocks"]:
    """The inverse of `scales_to_columns`."""
    return scales[:, :num_rows].T


def scales_shape(shape: tuple[int, ...], scales_layout: ScalesLayout) -> tuple[int, int]:
    """Shape of the scales of an array of `shape`, [M, K]."""
    m, blocks = shape[0], -(-shape[1] // BLOCK)
    return (m, blocks) if scales_layout == "rows" else (blocks, -(-m // 4) * 4)


def check_layout(scales_layout: str) -> None:
    """Raises ValueError for an unknown layout."""
    if scales_layout not in get_args(ScalesLayout):
        raise ValueError(f"scales_layout is {scales_layout!r}; allowed: {', '.join(get_args(ScalesLayout))}")
