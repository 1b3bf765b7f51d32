"""The two roles of a worker's warpgroups, `load` and `compute`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.compat import WGMMA, WGMMA_ROW, Target
from pallas_kernels.mfa_decode.block import FLOOR, Place, Sums, attend_block
from pallas_kernels.mfa_decode.geometry import TILE, Fragment, Geometry, Refs, for_each_fragment
from pallas_kernels.mfa_decode.plan import BLOCK
from pallas_kernels.mfa_decode.queries import split_queries


def load(geometry: Geometry, refs: Refs) -> None:
    """Keeps the rings full, also across fragments, and fetches each fragment's queries."""
    pair = lax.axis_index("pair")
    span = geometry.tiles_per_cta * TILE
    # Blocks that are fetched before a fragment's queries: never more tiles than a ring has slots.
    blocks_ahead = geometry.rings
    first_page = refs["first_page"][0]

    def fetch_queries(fragment: Fragment) -> None:
        source = refs["rows"].at[fragment.sequence, pl.ds(pair * span, span)]
        plgpu.copy_gmem_to_smem(source, refs["queries"], refs["queries_full"])

    def fetch(kind: str, page: jax.Array, place: jax.Array, ring: jax.Array | int, turn: jax.Array) -> None:
        """Fills the slot of `turn` with a block of a page, as soon as the slot is free; in the first round it is."""
        slot = geometry.slot(ring, turn)

        @pl.when(turn >= geometry.slots)
        def wait_for_slot() -> None:
            plgpu.barrier_wait(refs["free"].at[slot])

        source = refs[f"{kind}s"].at[page]
        if geometry.blocks_per_page > 1:
            source = source.at[pl.ds(place * BLOCK, BLOCK)]
        plgpu.copy_gmem_to_smem(source, refs["ring"].at[slot], refs["full"].at[slot])
        if "scales" in refs:
            scales = refs[f"{kind}_scales"].at[page]
            if geometry.blocks_per_page > 1:
                scales = scales.at[:, pl.ds(place * BLOCK, BLOCK)]
            plgpu.copy_gmem_to_smem(scales, refs["scales"].at[slot], refs["full"].at[slot])

    def fetch_fragment(
        fragment: Fragment, carry: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        done, turns = carry[0], (carry[1], carry[2])
        count = fragment.num_blocks

        if not geometry.is_narrow:

            @pl.when((done == 0) & (count > 0))
            def fetch_first_queries() -> None:
                fetch_queries(fragment)

        def fetch_block(index: jax.Array, _: tuple[()]) -> tuple[()]:
            block = fragment.first_block + index
            ring = lax.rem(index, jnp.int32(geometry.rings))
            turn = geometry.turn(turns, ring) + 2 * lax.div(index, jnp.int32(geometry.rings))
            page = first_page + refs["table"][fragment.sequence, lax.div(block, jnp.int32(geometry.blocks_per_page))]
            place = lax.rem(block, jnp.int32(geometry.blocks_per_page))
            fetch("key", page, place, ring, turn)
            fetch("value", page, place, ring, turn + 1)

            if not geometry.is_narrow:
                # The queries' buffer is free only when the previous fragment is done. By now this fragment's first
                # blocks are in flight, in slots that do not wait for its queries.
                @pl.when((done > 0) & (index == jnp.minimum(count, blocks_ahead) - 1))
                def fetch_next_queries() -> None:
                    plgpu.barrier_wait(refs["queries_free"])
                    fetch_queries(fragment)

            return ()

        lax.fori_loop(0, count, fetch_block, ())
        return (done + jnp.minimum(count, 1), *geometry.advance(turns, count))

    zero = jnp.int32(0)
    done, *turns = for_each_fragment(refs, fetch_fragment, (zero, zero, zero))

    # Wait for every arrival: no barrier may be left in the middle of a phase.
    if not geometry.is_narrow:

        @pl.when(done > 0)
        def drain_queries() -> None:
            plgpu.barrier_wait(refs["queries_free"])

    for ring in range(geometry.rings):

        def drain(turn: jax.Array, _: tuple[()], ring: int = ring) -> tuple[()]:
            plgpu.barrier_wait(refs["free"].at[geometry.slot(ring, turn)])
            return ()

        lax.fori_loop(jnp.maximum(turns[ring] - geometry.slots, 0), turns[ring], drain, ())


def compute(geometry: Geometry, target: Target, warpgroup: jax.Array, refs: Refs) -> None:
    """Attention of one tile's rows over this warpgroup's blocks of each fragment."""
    queries = None if geometry.is_narrow else refs["queries"]
    if geometry.is_shared:
        queries = None if queries is None else queries.at[pl.ds(warpgroup * TILE, TILE)]
        tile, ring, first, stride = lax.axis_index("pair") * 2 + warpgroup, jnp.int32(0), jnp.int32(0), 1
    else:
        tile, ring, first, stride = jnp.int32(0), warpgroup, warpgroup, 2

    def attend_fragment(fragment: Fragment, turns: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        count = fragment.num_blocks
        length = refs["lengths"][fragment.sequence]
        first_turn = geometry.turn(turns, ring)

        @pl.when(count > 0)
        def get_queries() -> None:
            if geometry.is_narrow:
                split_queries(geometry, target, refs, warpgroup, tile, fragment.sequence)
            else:
                plgpu.barrier_wait(refs["queries_full"])

        def step(index: jax.Array, sums: Sums) -> Sums:
            turn = first_turn + 2 * index
            place = Place(
                warpgroup=warpgroup,
                first_row=tile * TILE,
                first_token=(fragment.first_block + first + index * stride) * BLOCK,
                length=length,
                key_slot=geometry.slot(ring, turn),
                value_slot=geometry.slot(ring, turn + 1),
            )
            return attend_block(geometry, target, refs, queries, place, sums)

        empty = (
            target.full((TILE, geometry.head_dim), 0.0, WGMMA),
            target.full((TILE,), FLOOR, WGMMA_ROW),
            target.full((TILE,), 0.0, WGMMA_ROW),
        )
        own = lax.div(count - first + (stride - 1), jnp.int32(stride))
        sums = lax.fori_loop(0, own, step, empty)

        def store(total: jax.Array, top: jax.Array, norm: jax.Array) -> None:
            # From registers: four threads write 32 bytes of a row, a whole sector, and no shared memory is needed.
            rows = pl.ds(tile * TILE, TILE)
            refs["parts"][fragment.number, rows] = total
            refs["tops"][fragment.number, rows] = top
            refs["norms"][fragment.number, rows] = norm

        def store_own() -> None:
            if not geometry.is_narrow:
                plgpu.barrier_arrive(refs["queries_free"])
            store(*sums)

        def merge() -> None:
            # One branch or the other, not two separate conditions: the sums fill the registers, and must be dead in a
            # branch once it has finished with them.
            tokens = (count * BLOCK).astype(jnp.float32)
            lax.cond(
                warpgroup == 0,
                lambda: store(*_take(geometry, target, refs, sums, tokens)),
                lambda: _give(geometry, refs, sums, tokens),
            )

        pl.when(count > 0)(store_own if geometry.is_shared else merge)
        return geometry.advance(turns, count)

    for_each_fragment(refs, attend_fragment, (jnp.int32(0), jnp.int32(0)))


# The second warpgroup's sums go to the first in two 16-bit parts (together 16 bits of a number in bfloat16, 22 in float16),
# divided by the fragment's number of tokens, so that they are within float16's range. Both parts fit into the two buffers
# of decoded rows; without those only the queries' buffer is free, for one part after the other: the rings are filling for
# the next fragment.


def _give(geometry: Geometry, refs: Refs, sums: Sums, tokens: jax.Array) -> None:
    total, top, norm = sums
    total = total * (1.0 / tokens)
    high = total.astype(geometry.dtype)
    rest = (total - high.astype(jnp.float32)).astype(geometry.dtype)
    # The other warpgroup has read the queries and its decoded rows for the last time in this fragment, and so have all warps
    # of this one.
    plgpu.barrier_wait(refs["read"])
    plgpu.commit_smem()
    refs["sums"][0] = top
    refs["sums"][1] = norm
    if "decoded" in refs:
        refs["decoded"].at[0][...] = high
        refs["decoded"].at[1][...] = rest
        plgpu.commit_smem()
        plgpu.barrier_arrive(refs["given"])
        plgpu.barrier_wait(refs["taken"])
        return
    refs["queries"][...] = high
    plgpu.commit_smem()
    plgpu.barrier_arrive(refs["given"])
    plgpu.barrier_wait(refs["taken"])
    refs["queries"][...] = rest
    # Also orders these stores before the next queries, which use another proxy.
    plgpu.commit_smem()
    plgpu.barrier_arrive(refs["given"])


def _take(geometry: Geometry, target: Target, refs: Refs, sums: Sums, tokens: jax.Array) -> Sums:
    total, top, norm = sums
    plgpu.barrier_arrive(refs["read"])
    plgpu.barrier_wait(refs["given"])
    other_top = target.load(refs["sums"].at[0], WGMMA_ROW)
    other_norm = target.load(refs["sums"].at[1], WGMMA_ROW)
    new_top = jnp.maximum(top, other_top)
    shrink, weight = jnp.exp2(top - new_top), jnp.exp2(other_top - new_top)
    factor = lax.broadcast_in_dim(weight * tokens, total.shape, [0])
    total = total * lax.broadcast_in_dim(shrink, total.shape, [0])
    is_decoded = "decoded" in refs
    buffers = [refs["decoded"].at[part] for part in range(2)] if is_decoded else [refs["queries"]] * 2
    total = total + target.load(buffers[0], WGMMA).astype(jnp.float32) * factor
    if is_decoded:
        # Otherwise the compiler loads both parts first, without enough registers.
        plgpu.commit_smem()
    else:
        target.finish_reads()
        plgpu.barrier_arrive(refs["taken"])
        plgpu.barrier_wait(refs["given"])
    total = total + target.load(buffers[1], WGMMA).astype(jnp.float32) * factor
    target.finish_reads()
    if is_decoded:
        plgpu.barrier_arrive(refs["taken"])
    if not geometry.is_narrow:
        plgpu.barrier_arrive(refs["queries_free"])
    return total, new_top, norm * shrink + other_norm * weight
