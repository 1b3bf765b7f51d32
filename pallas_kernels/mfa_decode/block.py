"""One block of 64 tokens against one tile of 64 rows: scores, online softmax, weighted values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.compat import WGMMA, WGMMA_8BIT, WGMMA_COLUMN, WGMMA_ROW, Ref, Target
from pallas_kernels.mfa_decode.geometry import EXPONENT, MANTISSA, ONE, TILE, Geometry, Refs
from pallas_kernels.mfa_decode.plan import BLOCK
from pallas_kernels.mfa_decode.queries import operands
from pallas_kernels.mfa_decode.unpack import E4M3_UNIT, unpack_keys, unpack_values

# A masked score, and the initial running maximum. The gap keeps 2^(HIDDEN - maximum) at zero in a row that has seen
# nothing yet.
HIDDEN, FLOOR = -1e30, -5e29
# Columns decoded or cleared at a time: a whole block at once would need more registers than there are.
FP8_CHUNK, CLEAR_CHUNK = 128, 64
# Weighted values [64, K], running maximum [64], sum of weights [64].
Sums = tuple[jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Place:
    """The position of a block; all scalars.

    Attributes:
      warpgroup: The computing warpgroup.
      first_row: First row of the tile, among T*H.
      first_token: First token of the block, in its sequence.
      length: Length of the sequence.
      key_slot, value_slot: Slots of the ring.
    """

    warpgroup: jax.Array
    first_row: jax.Array
    first_token: jax.Array
    length: jax.Array
    key_slot: jax.Array
    value_slot: jax.Array


def attend_block(geometry: Geometry, target: Target, refs: Refs, queries: Ref | None, place: Place, sums: Sums) -> Sums:
    """Adds a block to the sums: waits for its tiles, and frees their slots as soon as they are read.

    `queries` are this warpgroup's tile in 16 bits; None with e4m3 terms.
    """
    total, top, norm = sums
    plgpu.barrier_wait(refs["full"].at[place.key_slot])
    mantissa = unshift = None
    if queries is not None:
        scores = target.dot(queries, refs["ring"].at[place.key_slot]) * geometry.scale
        _release(target, refs, place.key_slot)
    elif geometry.storage == "fp8":
        scores, mantissa, unshift = _fp8_scores(geometry, target, refs, place)
    else:
        scores = _int4_scores(geometry, target, refs, place)
    scores = jnp.where(_is_visible(geometry, target, place), scores, HIDDEN)

    new_top = jnp.maximum(top, jnp.max(scores, axis=1))
    shrink = jnp.exp2(top - new_top)
    weights = jnp.exp2(scores - lax.broadcast_in_dim(new_top, scores.shape, [0]))
    if mantissa is not None and unshift is not None:
        added = jnp.sum(weights * lax.broadcast_in_dim(unshift, scores.shape, [1]), axis=1)
        weights = weights * lax.broadcast_in_dim(mantissa, scores.shape, [1])
    else:
        added = jnp.sum(weights, axis=1)
    weights = weights.astype(geometry.dtype)
    total = total * lax.broadcast_in_dim(shrink, total.shape, [0])

    if queries is None:
        values = _decoded(refs, place)
    else:
        plgpu.barrier_wait(refs["full"].at[place.value_slot])
        values = refs["ring"].at[place.value_slot]
    _clear_tail(geometry, target, refs, values, place)
    total = target.add_dot(total, weights, values)
    if queries is not None:
        _release(target, refs, place.value_slot)
    return total, new_top, norm * shrink + added


def _fp8_scores(geometry: Geometry, target: Target, refs: Refs, place: Place) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scores from keys in stored form, while the values are converted; and the factors from `_split_scales`."""
    shape, columns = (TILE, BLOCK), geometry.part_columns
    keys, values = (refs["ring"].at[slot] for slot in (place.key_slot, place.value_slot))
    factors = _token_scales(target, refs, place.key_slot)

    def convert() -> None:
        decoded = _decoded(refs, place)
        for start in range(0, geometry.head_dim, FP8_CHUNK):
            chunk = pl.ds(start, FP8_CHUNK)
            decoded[:, chunk] = target.load(values.at[:, chunk], WGMMA_8BIT).astype(geometry.dtype)

    pairs = [
        pair
        for part in range(geometry.num_parts)
        for pair in operands(geometry, refs, place.warpgroup, part, keys.at[:, pl.ds(part * columns, columns)])
    ]
    scores = target.dot_pairs(pairs, lambda: _make_values(refs, place, convert))
    _release(target, refs, place.key_slot)
    shift, mantissa, unshift = _split_scales(target, refs, place)
    _release(target, refs, place.value_slot)
    scores = scores * _row_factors(target, refs, place, geometry.scale) * lax.broadcast_in_dim(factors, shape, [1])
    return scores + lax.broadcast_in_dim(shift, shape, [1]), mantissa, unshift


def _int4_scores(geometry: Geometry, target: Target, refs: Refs, place: Place) -> jax.Array:
    """Scores from keys in e4m3, by groups of columns that share a scale, while the values are decoded."""
    keys = refs["unpacked"].at[place.warpgroup]
    # Another warp of this warpgroup may still be reading for the previous products.
    plgpu.commit_smem()
    unpack_keys(target, refs["ring"].at[place.key_slot], keys)
    # The tensor cores read through a different proxy than these stores.
    plgpu.commit_smem()

    def convert() -> None:
        slot = place.value_slot
        unpack_values(target, refs["ring"].at[slot], refs["scales"].at[slot], _decoded(refs, place))
        _release(target, refs, slot)

    def multiply(part: jax.Array | int, meanwhile: Callable[[], None] | None) -> jax.Array:
        product = target.dot_pairs(operands(geometry, refs, place.warpgroup, part, keys.at[part]), meanwhile)
        scale = target.load(refs["scales"].at[place.key_slot, part], WGMMA_COLUMN).astype(jnp.float32)
        return product * lax.broadcast_in_dim(scale, product.shape, [1])

    # A separate loop: unrolled, the compiler would need registers for each product, more than there are.
    scores = lax.fori_loop(
        1,
        geometry.num_parts,
        lambda part, scores: scores + multiply(part, None),
        multiply(0, lambda: _make_values(refs, place, convert)),
    )
    _release(target, refs, place.key_slot)
    return scores * _row_factors(target, refs, place, geometry.scale * E4M3_UNIT)


def _make_values(refs: Refs, place: Place, convert: Callable[[], None]) -> None:
    """Waits for a block's values and calls `convert`, which writes them in 16 bits."""
    plgpu.barrier_wait(refs["full"].at[place.value_slot])
    # Another warp of this warpgroup may still be reading for the previous product.
    plgpu.commit_smem()
    convert()
    plgpu.commit_smem()


def _row_factors(target: Target, refs: Refs, place: Place, scale: float) -> jax.Array:
    """The divisors of the queries' rows, times `scale`, [64, 64]."""
    rows = target.load(refs["factors"].at[place.warpgroup], WGMMA_ROW) * scale
    return lax.broadcast_in_dim(rows, (TILE, BLOCK), [0])


def _release(target: Target, refs: Refs, slot: jax.Array) -> None:
    target.finish_reads()
    plgpu.barrier_arrive(refs["free"].at[slot])


def _decoded(refs: Refs, place: Place) -> Ref:
    """This warpgroup's buffer of 16-bit rows."""
    # A slot is never negative, but the compiler does not know: otherwise it would keep this buffer's addresses, the same for
    # every block, in registers that are not available.
    return refs["decoded"].at[place.warpgroup + jnp.minimum(place.value_slot, 0)]


def _token_scales(target: Target, refs: Refs, slot: jax.Array) -> jax.Array:
    return target.load(refs["scales"].at[slot, 0], WGMMA_COLUMN)


def _split_scales(target: Target, refs: Refs, place: Place) -> tuple[jax.Array, jax.Array, jax.Array]:
    """e, r and 2^-e of each token's value scale 2^e * r, r in [1, 2); harmless numbers past the sequence's end."""
    scales = _token_scales(target, refs, place.value_slot)
    positions = place.first_token + target.iota((BLOCK,), 0, WGMMA_COLUMN)
    scales = jnp.where(positions < place.length, jnp.maximum(scales, jnp.finfo(jnp.float32).tiny), 1.0)
    bits = lax.bitcast_convert_type(scales, jnp.int32)
    exponent = lax.shift_right_logical(bits, 23) - 127
    mantissa = lax.bitcast_convert_type((bits & MANTISSA) | ONE, jnp.float32)
    unshift = lax.bitcast_convert_type(2 * ONE - (bits & EXPONENT), jnp.float32)
    return exponent.astype(jnp.float32), mantissa, unshift


def _is_visible(geometry: Geometry, target: Target, place: Place) -> jax.Array:
    """Which scores of the block count."""
    shape = (TILE, BLOCK)
    positions = place.first_token + target.iota(shape, 1, WGMMA)
    if geometry.tokens == 1:
        return positions < place.length
    # Padding rows get tokens past the last one: they see what the last one sees.
    token = lax.div(place.first_row + target.iota(shape, 0, WGMMA), jnp.int32(geometry.heads))
    return positions < jnp.minimum(place.length - geometry.tokens + 1 + token, place.length)


def _clear_tail(geometry: Geometry, target: Target, refs: Refs, values: Ref, place: Place) -> None:
    """Zeroes rows past the sequence's end: a weight of 0 does not help against a NaN there."""
    num_valid = place.length - place.first_token

    def clear(start: int, stop: int) -> None:
        for column in range(start, stop, CLEAR_CHUNK):
            chunk = values.at[:, pl.ds(column, CLEAR_CHUNK)]
            rows = target.iota((BLOCK, CLEAR_CHUNK), 0, WGMMA)
            chunk[...] = jnp.where(rows < num_valid, target.load(chunk, WGMMA), jnp.zeros((), geometry.dtype))
        plgpu.commit_smem()

    @pl.when(num_valid < BLOCK)
    def clear_all() -> None:
        if not geometry.is_shared or "decoded" in refs:
            clear(0, geometry.head_dim)
            return
        # Both warpgroups read this slot: each clears half the columns, then waits for the other.
        half = geometry.head_dim // 2
        lax.cond(place.warpgroup == 0, lambda: clear(0, half), lambda: clear(half, geometry.head_dim))
        plgpu.barrier_arrive(refs["cleared"])
        plgpu.barrier_wait(refs["cleared"])
