"""Computes the order of the rows on a GPU: one launch instead of XLA's dozen, each of which waits for the previous one.

A CTA, one warpgroup, ranks 64 (token, choice) pairs. Each has all pairs' experts in shared memory (12 KB for 3,072
pairs) and counts them itself: 64 experts x 64 pairs are compared at a time, 32 comparisons per thread, which for 3,072 pairs
is about 3,000 instructions per warp, less than a second launch would take. From the counts, the start of each expert's tiles
is one more comparison of 64 x 64. So no CTA waits for another. Rows are found by pair, so the row's pair and
its weight are scattered, 64 numbers per CTA one by one.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.compat import WGMMA, WGMMA_COLUMN, WGMMA_ROW, Ref, Target
from pallas_kernels.moe_permute.reference import MAX_BUNDLE, Permutation, Tiles, max_tiles

# Pairs that a CTA ranks, and experts that it counts: the sides of a tensor-core layout.
PAIRS = 64
MAX_EXPERTS = 64
# Limit of a bulk copy along an axis; with more the counting takes longer than XLA's launches.
MAX_CHUNKS = 256


def unsupported(num_pairs: int, num_experts: int, tile_rows: int) -> str | None:
    """Why the kernel cannot serve; None if it can."""
    if num_pairs > PAIRS * MAX_CHUNKS or num_experts > MAX_EXPERTS:
        return (
            f"the kernel plans up to {PAIRS * MAX_CHUNKS} pairs of {MAX_EXPERTS} experts; "
            f"these are {num_pairs} of {num_experts}"
        )
    if tile_rows & (tile_rows - 1):
        return f"the kernel plans tiles of a power of two rows, not of {tile_rows}"
    return None


def plan_permutation(
    experts: Int[Array, "N top_k"],
    weights: Float[Array, "N top_k"],
    layer: Int[Array, ""],
    *,
    num_experts: int,
    first_expert: int,
    tile_rows: int,
    interpret: bool,
    detect_races: bool = False,
) -> tuple[Permutation, Float[Array, " R"]]:
    """The permutation, with tiles pointing at a layer of a stack of layers, and the weight of each row.

    Like `reference.plan_permutation`, `point_at` and `permute_weights` together, except that pairs and weights of rows
    without a pair, and unused tiles, may be anything.
    """
    target = Target(interpret=interpret, detect_races=detect_races)
    num_pairs = experts.size
    num_chunks = -(-num_pairs // PAIRS)
    missing = num_chunks * PAIRS - num_pairs
    num_tiles = max_tiles(num_pairs, num_experts, tile_rows)
    num_rows = num_tiles * tile_rows
    # -1 means no expert.
    flat = jnp.pad(experts.reshape(-1).astype(jnp.int32), (0, missing), constant_values=-1)
    pairs, row_weights, rows, table, used = plgpu.kernel(
        functools.partial(
            _body,
            num_pairs=num_pairs,
            num_rows=num_rows,
            num_experts=num_experts,
            first_expert=first_expert,
            tile_rows=tile_rows,
            target=target,
        ),
        out_type=[
            jax.ShapeDtypeStruct((num_rows,), jnp.int32),
            jax.ShapeDtypeStruct((num_rows,), jnp.float32),
            jax.ShapeDtypeStruct((num_chunks * PAIRS,), jnp.int32),
            jax.ShapeDtypeStruct((num_tiles, 4), jnp.int32),
            jax.ShapeDtypeStruct((1,), jnp.int32),
        ],
        grid=(num_chunks,),
        grid_names=("chunk",),
        scratch_types=[
            plgpu.SMEM((num_chunks, PAIRS), jnp.int32),
            *(plgpu.SMEM((PAIRS,), jnp.int32) for _ in range(5)),
            plgpu.Barrier(num_arrivals=1),
        ],
        kernel_name="moe_plan",
        **target.kernel_options(),
    )(flat.reshape(num_chunks, PAIRS), weights.reshape(-1).astype(jnp.float32), layer.reshape(1))
    rows = rows if missing == 0 else rows[:num_pairs]
    return Permutation(pairs, rows.reshape(experts.shape), Tiles(table, used)), row_weights


def _body(
    experts_ref: Ref,
    weights_ref: Ref,
    layer_ref: Ref,
    pairs_ref: Ref,
    row_weights_ref: Ref,
    rows_ref: Ref,
    table_ref: Ref,
    used_ref: Ref,
    experts: Ref,
    counts: Ref,
    starts: Ref,
    bases: Ref,
    rows: Ref,
    own_experts: Ref,
    copied: Ref,
    *,
    num_pairs: int,
    num_rows: int,
    num_experts: int,
    first_expert: int,
    tile_rows: int,
    target: Target,
) -> None:
    """Shared memory holds `counts` of pairs, `starts` (first tile) and `bases` (row of the first pair here) of each expert,
    and `rows` and `own_experts` of this CTA's pairs.
    """
    chunk = lax.axis_index("chunk")
    num_chunks = experts_ref.shape[0]
    shape = (PAIRS, PAIRS)
    plgpu.copy_gmem_to_smem(experts_ref, experts, copied)
    plgpu.barrier_wait(copied)
    down, across = target.iota(shape, 0, WGMMA), target.iota(shape, 1, WGMMA)

    # Layouts are given explicitly everywhere: inferring them would take minutes here.
    def select(mask: jax.Array, value: jax.Array | int) -> jax.Array:
        return target.cast_layout(jnp.where(mask, value, jnp.zeros((), jnp.int32)), WGMMA)

    def add_up(value: jax.Array) -> jax.Array:
        return target.cast_layout(jnp.sum(value, axis=1), WGMMA_ROW)

    def along_columns(ref: Ref) -> jax.Array:
        return target.cast_layout(lax.broadcast_in_dim(target.load(ref, WGMMA_COLUMN), shape, [1]), WGMMA)

    def count(index: jax.Array, totals: jax.Array) -> jax.Array:
        # Rows are experts, columns pairs.
        return totals + select(down + first_expert == along_columns(experts.at[index]), jnp.ones((), jnp.int32))

    none = target.full(shape, 0.0, WGMMA, jnp.int32)
    before = lax.fori_loop(0, chunk, count, none)
    earlier = add_up(before)
    total = add_up(lax.fori_loop(chunk, num_chunks, count, before))
    counts[...] = total
    # Read by other threads than those that wrote it.
    plgpu.commit_smem()
    tiles = lax.shift_right_logical(along_columns(counts) + (tile_rows - 1), jnp.int32(tile_rows.bit_length() - 1))
    first = add_up(select((across < down) & (across < num_experts), tiles))
    starts[...] = first
    bases[...] = first * tile_rows + earlier
    plgpu.commit_smem()

    # Rows are this CTA's pairs now.
    mine = target.load(experts.at[chunk], WGMMA_ROW)
    # A second copy of them: layout inference cannot read one buffer in two layouts.
    own_experts[...] = mine
    plgpu.commit_smem()
    own = target.cast_layout(lax.broadcast_in_dim(mine, shape, [0]), WGMMA)
    is_mine = (own == across + first_expert) & (across < num_experts)
    base = add_up(select(is_mine, along_columns(bases)))
    is_here = add_up(select(is_mine, jnp.ones((), jnp.int32)))
    is_before = (own == along_columns(own_experts)) & (across < down)
    rank = add_up(select(is_before, jnp.ones((), jnp.int32)))
    row = jnp.where(is_here > 0, base + rank, jnp.full((), num_rows, jnp.int32))
    rows_ref[pl.ds(chunk * PAIRS, PAIRS)] = row
    rows[...] = row
    plgpu.commit_smem()

    def scatter(index: jax.Array, _: tuple[()]) -> tuple[()]:
        place, pair = rows[index], chunk * PAIRS + index

        @pl.when((place < num_rows) & (pair < num_pairs))
        def _store() -> None:
            pairs_ref[place] = pair
            row_weights_ref[place] = weights_ref[pair]

        return ()

    lax.fori_loop(0, PAIRS, scatter, ())

    def describe(turn: jax.Array, _: tuple[()]) -> tuple[()]:
        """The tiles of one expert."""
        expert = chunk + turn * num_chunks
        start, pairs = starts[expert], counts[expert]
        num_tiles = lax.div(pairs + (tile_rows - 1), jnp.int32(tile_rows))

        def write(index: jax.Array, _: tuple[()]) -> tuple[()]:
            bundle = lax.div(index, jnp.int32(MAX_BUNDLE)) * MAX_BUNDLE
            table_ref[start + index, 0] = expert + layer_ref[0] * num_experts
            table_ref[start + index, 1] = start + bundle
            table_ref[start + index, 2] = jnp.minimum(num_tiles - bundle, MAX_BUNDLE)
            table_ref[start + index, 3] = jnp.minimum(pairs - index * tile_rows, tile_rows)
            return ()

        lax.fori_loop(0, num_tiles, write, ())

        @pl.when(expert == num_experts - 1)
        def _store_used() -> None:
            used_ref[0] = start + num_tiles

        return ()

    lax.fori_loop(0, lax.div(num_experts - chunk + num_chunks - 1, jnp.int32(num_chunks)), describe, ())
