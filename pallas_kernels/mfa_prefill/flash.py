"""The work of a compute warpgroup: 64 query rows against blocks of keys and values from a ring.

The running softmax of FlashAttention, in powers of two. Two such warpgroups share the ring and take turns (Shah et al.,
FlashAttention-3, arXiv 2407.08608, section 3.1): while one uses the tensor cores, the other computes its softmax.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.compat import WGMMA, WGMMA_COLUMN, WGMMA_ROW, Ref, Target

# Rows of a warpgroup's product, and the computing warpgroups; one more loads the blocks.
ROWS = 64
COMPUTE_WARPGROUPS = 2
# The largest score of a row that has seen no key: finite, so that the difference of two of them is zero.
LOWEST = -1e30
FLOAT16_MAX = 65504.0


class Ring(NamedTuple):
    """Blocks in flight: item 2 i is block i's keys, item 2 i + 1 its values.

    Attributes:
      items: [slots, keys of a block, K] in 16 bits, swizzled.
      full: An item has arrived; both warpgroups wait for it once per item.
      free: Both have read an item.
      scales: [2, 2, keys of a block] float32, those of keys and values of even and of odd blocks, read until the values
        are released; None without scales.
      scales_full: Both have arrived.
    """

    items: Ref
    full: Ref
    free: Ref
    scales: Ref | None = None
    scales_full: Ref | None = None


def attend(
    target: Target,
    queries: Ref,
    ring: Ring,
    turn: Ref,
    warpgroup: jax.Array,
    num_blocks: jax.Array,
    num_plain: jax.Array,
    hide: Callable[[jax.Array, jax.Array], jax.Array],
    scale: float,
    value_factor: jax.Array | None = None,
) -> jax.Array:
    """softmax(scale * q k^T) v of one warpgroup's rows; a row that sees no key is zero.

    Args:
      target: See `compat.Target`.
      queries: [ROWS, K], swizzled shared memory, already there.
      ring: Delivers `num_blocks` blocks.
      turn: Barrier of two arrivals, one from each warpgroup.
      warpgroup: 0 or 1.
      num_blocks: Blocks to read, the same for both warpgroups.
      num_plain: How many of them, from the first, are fully visible to all rows.
      hide: Replaces by -inf the scores [ROWS, keys] of block i that a row must not see.
      scale: Factor of the scores.
      value_factor: If the ring delivers scales, a factor that brings the values' scales near 1. Weights times scales
        are float16 for the product, and would otherwise underflow.

    Returns:
      float32 [ROWS, K] in the layout of an accumulator.
    """
    slots, block, head_dim = ring.items.shape
    factor = scale * math.log2(math.e)

    def take_turns() -> None:
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    def slot_of(item: jax.Array) -> jax.Array:
        return lax.rem(item, jnp.int32(slots))

    def spread(row: jax.Array, columns: int) -> jax.Array:
        return lax.broadcast_in_dim(row, (ROWS, columns), [0])

    def spread_columns(column: jax.Array) -> jax.Array:
        return lax.broadcast_in_dim(column, (ROWS, block), [1])

    def step(index: jax.Array, carry: tuple[jax.Array, ...], is_plain: bool) -> tuple[jax.Array, ...]:
        output, largest, total = carry
        key_slot, value_slot = slot_of(2 * index), slot_of(2 * index + 1)
        plgpu.barrier_wait(ring.full.at[key_slot])
        # The other warpgroup may start its products as soon as ours are issued: the tensor cores keep their order.
        scores = target.dot(queries, ring.items.at[key_slot], take_turns) * factor
        if ring.scales is not None and ring.scales_full is not None:
            pair = lax.rem(index, jnp.int32(2))
            plgpu.barrier_wait(ring.scales_full.at[pair])
            scores = scores * spread_columns(target.load(ring.scales.at[pair, 0], WGMMA_COLUMN))
        target.finish_reads()
        plgpu.barrier_arrive(ring.free.at[key_slot])
        if not is_plain:
            scores = hide(scores, index)
        new_largest = jnp.maximum(largest, scores.max(axis=1))
        kept = jnp.exp2(largest - new_largest)
        weights = jnp.exp2(scores - spread(new_largest, block))
        if ring.scales is None:
            operand = weights.astype(queries.dtype)
        else:
            added = weights.sum(axis=1)
            value_scales = target.load(ring.scales.at[pair, 1], WGMMA_COLUMN) * value_factor
            operand = jnp.minimum(weights * spread_columns(value_scales), FLOAT16_MAX).astype(queries.dtype)
        output = output * spread(kept, head_dim)
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(ring.full.at[value_slot])
        plgpu.barrier_wait(turn)
        if ring.scales is None:
            # After the barriers, so that the other warpgroup need not wait for it: jax's own kernel does the same for heads
            # above 128. With scales the weights would be held twice.
            added = weights.sum(axis=1)
        total = total * kept + added
        output = target.add_dot(output, operand, ring.items.at[value_slot])
        target.finish_reads()
        plgpu.barrier_arrive(ring.free.at[value_slot])
        return output, new_largest, total

    # Each block has two turns for each warpgroup; one more here for the second and one at the end for the first shift
    # them by half a block.
    pl.when(warpgroup == 1)(take_turns)
    carry = (
        target.full((ROWS, head_dim), 0.0, WGMMA),
        target.full((ROWS,), LOWEST, WGMMA_ROW),
        target.full((ROWS,), 0.0, WGMMA_ROW),
    )
    carry = lax.fori_loop(0, num_plain, lambda index, carry: step(index, carry, True), carry)
    output, _, total = lax.fori_loop(num_plain, num_blocks, lambda index, carry: step(index, carry, False), carry)
    pl.when(warpgroup == 0)(take_turns)
    inverse = jnp.where(total > 0.0, 1.0 / total, 0.0)
    if value_factor is not None:
        inverse = inverse / value_factor
    return output * spread(inverse, head_dim)


def feed(ring: Ring, num_blocks: jax.Array, load: Callable[[jax.Array, int, jax.Array], None]) -> None:
    """Delivers all items, alternating keys and values, and waits at the end until they are read.

    Args:
      ring: The target.
      num_blocks: Blocks to deliver.
      load: Called with block, 0 for keys or 1 for values, and a free slot; makes `full` complete.
    """
    slots = ring.items.shape[0]

    def bring(block: jax.Array, carry: tuple[()]) -> tuple[()]:
        for part in (0, 1):
            item = 2 * block + part
            slot = lax.rem(item, jnp.int32(slots))

            @pl.when(item >= slots)
            def _wait(slot: jax.Array = slot) -> None:
                plgpu.barrier_wait(ring.free.at[slot])

            load(block, part, slot)
        return carry

    lax.fori_loop(0, num_blocks, bring, ())

    def drain(item: jax.Array, carry: tuple[()]) -> tuple[()]:
        plgpu.barrier_wait(ring.free.at[lax.rem(item, jnp.int32(slots))])
        return carry

    # No barrier is left half-way: the next user of this memory starts afresh.
    num_items = 2 * num_blocks
    lax.fori_loop(jnp.maximum(num_items - slots, 0), num_items, drain, ())
