"""Adds up the fragments of each sequence: out = sum_f 2^(m_f - m) acc_f / sum_f 2^(m_f - m) l_f, m = max_f m_f.

A sequence of n fragments reads n * rows * (K + 2) float32 that the main kernel has just written, mostly from L2. XLA could
do it only by reading as many fragments for every sequence as the longest may have, or with atomic sums, whose order
varies from run to run.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.compat import WGMMA, WGMMA_ROW, Ref, Target
from pallas_kernels.quantise import FP8, FP8_MAX
from pallas_kernels.storage import BLOCK

TILE = 64
# Below any fragment's maximum.
FLOOR = -5e29
# Fragments of 64 x 128 that are loaded together: the sum and two of them take 192 of a thread's registers.
QUANTISED_UNROLL = 2


def combine(
    parts: Float[Array, "F R K"],
    tops: Float[Array, "F R"],
    norms: Float[Array, "F R"],
    fragments: Int[Array, "B 2"],
    *,
    dtype: jax.typing.DTypeLike,
    target: Target,
    columns: int,
    unroll: int,
) -> tuple[Float[Array, "B R K"], Float[Array, "B R"]]:
    """Output and natural log-sum-exp of each row; 0 and -inf for a row that saw nothing.

    Args:
      parts: Sums of weighted values of each fragment, not yet divided by `norms`.
      tops: Base-2 logarithms of the factor missing in `parts` and `norms`.
      norms: Sums of weights.
      fragments: First fragment and number of fragments of each sequence.
      dtype: Dtype of the output.
      target: Interpreter or GPU.
      columns: Columns of the head per CTA.
      unroll: Fragments that are loaded together, so that their latencies overlap.
    """
    batch, (_, rows, head_dim) = fragments.shape[0], parts.shape

    def mfa_combine(*refs: Ref) -> None:
        _body(*refs, columns=columns, unroll=unroll, target=target)

    out, lse = plgpu.kernel(
        mfa_combine,
        out_type=[
            jax.ShapeDtypeStruct((batch, rows, head_dim), dtype),
            jax.ShapeDtypeStruct((batch, rows), jnp.float32),
        ],
        grid=(batch, rows // TILE, head_dim // columns),
        grid_names=("sequence", "tile", "column"),
        **target.kernel_options(),
    )(fragments, parts, tops, norms)
    return out, lse


def combine_quantised(
    parts: Float[Array, "F R K"],
    tops: Float[Array, "F R"],
    norms: Float[Array, "F R"],
    fragments: Int[Array, "B 2"],
    *,
    heads: int,
    tokens: int,
    target: Target,
) -> tuple[Float[Array, "N columns"], Float[Array, "blocks padded_N"]]:
    """Like `combine`, with each token's heads side by side and quantised: e4m3 values, and scales as columns.

    A CTA has 64 heads of one token and 128 of their columns: one scale per row. It reads the same as `combine`.

    Args:
      parts, tops, norms, fragments, target: As in `combine`.
      heads: H, a multiple of 64.
      tokens: T; the rows after T H are padding.
    """
    batch, head_dim = fragments.shape[0], parts.shape[2]
    num_rows, columns = batch * tokens, head_dim // BLOCK

    def mfa_combine_quantised(*refs: Ref) -> None:
        _body_quantised(*refs, tokens=tokens, tiles=heads // TILE, target=target)

    values, scales = plgpu.kernel(
        mfa_combine_quantised,
        out_type=[
            jax.ShapeDtypeStruct((num_rows, heads, head_dim), FP8),
            jax.ShapeDtypeStruct((heads, columns, num_rows + -num_rows % 4), jnp.float32),
        ],
        grid=(batch, tokens * heads // TILE, columns),
        grid_names=("sequence", "tile", "column"),
        **target.kernel_options(),
    )(fragments, parts, tops, norms)
    return values.reshape(num_rows, heads * head_dim), scales.reshape(heads * columns, -1)


def _body_quantised(
    fragments_ref: Ref,
    parts_ref: Ref,
    tops_ref: Ref,
    norms_ref: Ref,
    values_ref: Ref,
    scales_ref: Ref,
    *,
    tokens: int,
    tiles: int,
    target: Target,
) -> None:
    """`tiles` of 64 heads are a token."""
    b, tile, column = lax.axis_index("sequence"), lax.axis_index("tile"), lax.axis_index("column")
    span = pl.ds(column * BLOCK, BLOCK)
    total, _, norm = _add_up(fragments_ref, parts_ref, tops_ref, norms_ref, span, BLOCK, QUANTISED_UNROLL, target)
    out = total / _across(jnp.where(norm > 0, norm, 1.0), BLOCK)
    largest = jnp.max(jnp.abs(out), axis=1)
    scale = jnp.where(largest > 0.0, largest / FP8_MAX, 1.0)
    row = b * tokens + lax.div(tile, jnp.int32(tiles))
    heads = pl.ds(lax.rem(tile, jnp.int32(tiles)) * TILE, TILE)
    # A quotient may round to just above the largest value, which e4m3 would turn into NaN.
    values_ref[row, heads, span] = jnp.clip(out / _across(scale, BLOCK), -FP8_MAX, FP8_MAX).astype(FP8)
    scales_ref[heads, column, row] = scale


def _body(
    fragments_ref: Ref,
    parts_ref: Ref,
    tops_ref: Ref,
    norms_ref: Ref,
    out_ref: Ref,
    lse_ref: Ref,
    *,
    columns: int,
    unroll: int,
    target: Target,
) -> None:
    b, tile, column = lax.axis_index("sequence"), lax.axis_index("tile"), lax.axis_index("column")
    rows, span = pl.ds(tile * TILE, TILE), pl.ds(column * columns, columns)
    total, top, norm = _add_up(fragments_ref, parts_ref, tops_ref, norms_ref, span, columns, unroll, target)
    is_any = norm > 0
    divisor = jnp.where(is_any, norm, 1.0)
    out_ref[b, rows, span] = (total / _across(divisor, columns)).astype(out_ref.dtype)

    @pl.when(column == 0)
    def write_lse() -> None:
        lse_ref[b, rows] = jnp.where(is_any, top * math.log(2) + jnp.log(divisor), -jnp.inf)


def _add_up(
    fragments_ref: Ref,
    parts_ref: Ref,
    tops_ref: Ref,
    norms_ref: Ref,
    span: pl.Slice,
    columns: int,
    unroll: int,
    target: Target,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sum of the weighted values in the columns of `span`, its factor's logarithm, and sum of the weights, of each row."""
    b, rows = lax.axis_index("sequence"), pl.ds(lax.axis_index("tile") * TILE, TILE)
    first, count = fragments_ref[b, 0], fragments_ref[b, 1]

    def step(turn: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        total, top, norm = carry
        loaded = []
        for place in range(unroll):
            index = turn * unroll + place
            # Past the end the last one is read again with zero weight.
            fragment = first + jnp.minimum(index, count - 1)
            part_top = target.load(tops_ref.at[fragment, rows], WGMMA_ROW)
            part_top = part_top + jnp.where(index < count, 0.0, 2 * FLOOR)
            part_norm = target.load(norms_ref.at[fragment, rows], WGMMA_ROW)
            loaded.append((target.load(parts_ref.at[fragment, rows, span], WGMMA), part_top, part_norm))
        new_top = functools.reduce(jnp.maximum, [part_top for _, part_top, _ in loaded], top)
        shrink = jnp.exp2(top - new_top)
        total, norm = total * _across(shrink, columns), norm * shrink
        for part, part_top, part_norm in loaded:
            weight = jnp.exp2(part_top - new_top)
            total, norm = total + part * _across(weight, columns), norm + part_norm * weight
        return total, new_top, norm

    empty = (
        target.full((TILE, columns), 0.0, WGMMA),
        target.full((TILE,), FLOOR, WGMMA_ROW),
        target.full((TILE,), 0.0, WGMMA_ROW),
    )
    return lax.fori_loop(0, lax.div(count + (unroll - 1), jnp.int32(unroll)), step, empty)


def _across(rows: jax.Array, columns: int) -> jax.Array:
    return lax.broadcast_in_dim(rows, (rows.shape[0], columns), [0])
