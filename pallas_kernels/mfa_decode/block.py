"""One block of 64 tokens against one tile of 64 rows: scores, online softmax, weighted values."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.compat import WGMMA, WGMMA_8BIT, WGMMA_COLUMN, WGMMA_ROW, Ref, Target
from pallas_kernels.mfa_decode.geometry import TILE, Geometry, Refs
from pallas_kernels.mfa_decode.plan import BLOCK
from pallas_kernels.storage import INT4_GROUP

# A hidden score, and where the running maximum starts. The gap keeps 2^(HIDDEN - maximum) at zero in a row that has seen
# nothing yet.
HIDDEN, FLOOR = -1e30, -5e29
# Columns decoded or cleared at a time: a whole block at once takes more registers than there are.
FP8_CHUNK, CLEAR_CHUNK = 128, 64
# float32: the exponent's bits, the mantissa's, and 1.0. bfloat16: 128.0, whose lowest bits count ones.
EXPONENT, MANTISSA, ONE, BFLOAT16_128 = 0x7F800000, 0x007FFFFF, 0x3F800000, 0x4300
# Weighted values [64, K], running maximum [64], sum of weights [64].
Sums = tuple[jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a block is; all scalars.

    Attributes:
      warpgroup: That computes.
      first_row: Of the tile, among T*H.
      first_token: Of the block, in its sequence.
      length: Of the sequence.
      key_slot, value_slot: Of the ring.
    """

    warpgroup: jax.Array
    first_row: jax.Array
    first_token: jax.Array
    length: jax.Array
    key_slot: jax.Array
    value_slot: jax.Array


def attend_block(geometry: Geometry, target: Target, refs: Refs, queries: Ref, place: Place, sums: Sums) -> Sums:
    """Adds a block to the sums: waits for its tiles, and frees their slots as soon as they are read."""
    total, top, norm = sums
    is_fp8 = geometry.storage == "fp8"
    tile_shape = (TILE, BLOCK)

    plgpu.barrier_wait(refs["full"].at[place.key_slot])
    key_scales = _token_scales(target, refs, place.key_slot) if is_fp8 else None
    keys = _as_operand(geometry, target, refs, place, place.key_slot)
    scores = target.dot(queries, keys)
    if "decoded" not in refs:
        _release(target, refs, place.key_slot)
    if key_scales is None:
        scores = scores * geometry.scale
    else:
        scores = scores * lax.broadcast_in_dim(key_scales * geometry.scale, tile_shape, [1])
        plgpu.barrier_wait(refs["full"].at[place.value_slot])
        shift, mantissa, unshift = _split_scales(target, refs, place)
        scores = scores + lax.broadcast_in_dim(shift, tile_shape, [1])
    scores = jnp.where(_is_visible(geometry, target, place), scores, HIDDEN)

    new_top = jnp.maximum(top, jnp.max(scores, axis=1))
    shrink = jnp.exp2(top - new_top)
    weights = jnp.exp2(scores - lax.broadcast_in_dim(new_top, tile_shape, [0]))
    if is_fp8:
        added = jnp.sum(weights * lax.broadcast_in_dim(unshift, tile_shape, [1]), axis=1)
        weights = weights * lax.broadcast_in_dim(mantissa, tile_shape, [1])
    else:
        added = jnp.sum(weights, axis=1)
    weights = weights.astype(geometry.dtype)
    total = total * lax.broadcast_in_dim(shrink, total.shape, [0])

    if not is_fp8:
        plgpu.barrier_wait(refs["full"].at[place.value_slot])
    values = _as_operand(geometry, target, refs, place, place.value_slot)
    _clear_tail(geometry, target, refs, values, place)
    total = target.add_dot(total, weights, values)
    if "decoded" not in refs:
        _release(target, refs, place.value_slot)
    return total, new_top, norm * shrink + added


def _release(target: Target, refs: Refs, slot: jax.Array) -> None:
    target.finish_reads()
    plgpu.barrier_arrive(refs["free"].at[slot])


def _as_operand(geometry: Geometry, target: Target, refs: Refs, place: Place, slot: jax.Array) -> Ref:
    """The slot itself, or this warpgroup's buffer with the slot decoded to 16 bits; the slot is then free.

    The product that read the buffer before is over, and each store begins with a barrier of the warpgroup.
    """
    source = refs["ring"].at[slot]
    if "decoded" not in refs:
        return source
    # A slot is never negative, but the compiler does not know: else it keeps this buffer's addresses, the same for every
    # block, in registers that it has not got.
    decoded = refs["decoded"].at[place.warpgroup + jnp.minimum(slot, 0)]
    if geometry.storage == "fp8":
        for start in range(0, geometry.head_dim, FP8_CHUNK):
            columns = pl.ds(start, FP8_CHUNK)
            decoded[:, columns] = target.load(source.at[:, columns], WGMMA_8BIT).astype(geometry.dtype)
    else:
        words = target.load(source, WGMMA)
        for group in range(geometry.head_dim // INT4_GROUP):
            codes = lax.shift_right_logical(words, jnp.uint16(4 * group)) & jnp.uint16(15)
            numbers = lax.bitcast_convert_type(codes | jnp.uint16(BFLOAT16_128), jnp.bfloat16)
            scales = target.load(refs["scales"].at[slot, group], WGMMA_ROW)
            numbers = (numbers - jnp.bfloat16(128 + 8)) * lax.broadcast_in_dim(scales, numbers.shape, [0])
            decoded[:, pl.ds(group * INT4_GROUP, INT4_GROUP)] = numbers
    _release(target, refs, slot)
    # The tensor cores read through another proxy than these stores went.
    plgpu.commit_smem()
    return decoded


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
    # Rows that only fill up the tile get tokens past the last one: they see what that sees.
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
