"""Who computes what in `fp8_matmul`: tiles of the output, cut along K where there are too few of them for the GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.storage import BLOCK

# An index as loops hand it out: traced, or plain where nothing is traced.
Index = jax.Array | int
NUM_SMS = 132
# What there is to choose from: rows of a tile, 64 for each warpgroup that multiplies; shares (see `make`); and CTAs that
# share what they copy of x, which pays where there is much of it.
CHOICES = ((64, 1, 1), (64, 2, 1), (128, 1, 1), (128, 2, 1), (128, 1, 2), (128, 2, 2), (192, 1, 2), (192, 2, 2))
# Row tiles that run side by side in a large product: 10 x 192 rows and 13 x 128 columns use what they load most often.
GROUP = 10
# What the choice between tiles reckons with, for one multiprocessor of an H100: FLOP/us that promotion leaves of the
# peak, bytes/us from L2; for the GPU: bytes/us from HBM and, for partial sums, from L2; and us for one more launch.
# Read off the data sheet and published kernels, not measured here; `tools/gpu_check` measures the choice itself.
SM_FLOPS, SM_BYTES, HBM_BYTES, L2_BYTES, LAUNCH_US = 10.5e6, 40e3, 3.0e6, 4.0e6, 2.0


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Output tiles of block_m x (128 cluster), `depth` blocks of 128 columns of K each, dealt out to `num_workers`.

    A worker is a CTA, or a cluster of two with 128 columns each.

    All blocks of all tiles stand in one line, tile after tile; a unit is `span` of them. With span = depth a unit is a
    tile. Otherwise ("split") each unit is one worker's equal share of the line, and a tile is the sum of up to `num_parts`
    units: nothing waits for anything, the parts are added afterwards.
    """

    m: int
    n: int
    depth: int
    block_m: int
    span: int
    num_workers: int
    cluster: int

    @property
    def row_tiles(self) -> int:
        return -(-self.m // self.block_m)

    @property
    def column_tiles(self) -> int:
        return -(-self.n // (BLOCK * self.cluster))

    @property
    def num_blocks(self) -> int:
        return self.row_tiles * self.column_tiles * self.depth

    @property
    def num_units(self) -> int:
        return -(-self.num_blocks // self.span)

    @property
    def num_parts(self) -> int:
        """The most units that any tile is spread over."""
        return int(self.parts().max())

    def place(self, tile: Index) -> tuple[jax.Array, jax.Array]:
        """Row tile and column tile; GROUP row tiles go together, in them columns are slowest."""
        group_rows = min(GROUP, self.row_tiles)
        group, rest = _divide(tile, group_rows * self.column_tiles)
        first_row = group * group_rows
        rows = jnp.minimum(self.row_tiles - first_row, group_rows)
        return first_row + lax.rem(rest, rows), lax.div(rest, rows)

    def for_each_segment(self, worker: Index, visit: Callable[[Index, Index, Index, Index, Index], None]) -> jax.Array:
        """Calls visit(tile, part, start, stop, done) for what `worker` has to do, in order: blocks start..stop of a tile.

        `part` numbers the unit among those of the tile, `done` counts the blocks before. Returns the count of all.
        """

        def run_unit(turn: Index, done: Index) -> jax.Array:
            unit = worker + turn * self.num_workers
            low = unit * self.span
            high = jnp.minimum(low + self.span, self.num_blocks)
            first_tile = lax.div(low, jnp.int32(self.depth))

            def run_segment(index: Index, done: Index) -> jax.Array:
                tile = first_tile + index
                tile_low = tile * self.depth
                start, stop = jnp.maximum(low - tile_low, 0), jnp.minimum(high - tile_low, self.depth)
                visit(tile, unit - lax.div(tile_low, jnp.int32(self.span)), start, stop, done)
                return done + stop - start

            num_segments = lax.div(high - 1, jnp.int32(self.depth)) - first_tile + 1
            return lax.fori_loop(jnp.int32(0), num_segments, run_segment, done)

        turns = lax.div(self.num_units - worker + self.num_workers - 1, jnp.int32(self.num_workers))
        return lax.fori_loop(jnp.int32(0), turns, run_unit, jnp.int32(0))

    def parts(self) -> np.ndarray:
        """How many units made each tile: [row_tiles, column_tiles]."""
        group_rows = min(GROUP, self.row_tiles)
        row, column = np.indices((self.row_tiles, self.column_tiles))
        first_row = row // group_rows * group_rows
        rows = np.minimum(self.row_tiles - first_row, group_rows)
        start = (first_row * self.column_tiles + column * rows + row - first_row) * self.depth
        return (start + self.depth - 1) // self.span - start // self.span + 1


def make(m: int, n: int, k: int, *, block_m: int, split_k: int, cluster: int, num_ctas: int = NUM_SMS) -> Schedule:
    """A schedule with tiles of `block_m` rows; split_k = 1 keeps tiles whole, 2 gives every worker an equal share."""
    depth = -(-k // BLOCK)
    whole = Schedule(m, n, depth, block_m, depth, max(num_ctas // cluster, 1), cluster)
    if split_k > 1:
        return dataclasses.replace(whole, span=-(-whole.num_blocks // whole.num_workers))
    return whole


def default_blocks(m: int, n: int, k: int) -> dict[str, int]:
    """The choice of `CHOICES` that should take least time, by bytes and FLOPs."""
    choices = [dict(zip(("block_m", "split_k", "cluster"), choice, strict=True)) for choice in CHOICES]
    return min(choices, key=lambda choice: estimate_us(make(m, n, k, **choice)))


def estimate_us(schedule: Schedule) -> float:
    """Microseconds that bytes and FLOPs should take, turn by turn: in the last one there may be work for a few only."""
    # One warpgroup of products does not hide its own promotion; two do.
    flops = 2 * schedule.block_m * BLOCK * BLOCK * (1.6 if schedule.block_m == 64 else 1.0)
    loaded = (min(schedule.block_m, schedule.m) / schedule.cluster + BLOCK) * BLOCK
    unit_us = schedule.span * max(flops / SM_FLOPS, loaded / SM_BYTES)
    hbm_us = (schedule.m + schedule.n) * schedule.depth * BLOCK / HBM_BYTES
    turns, rest = divmod(schedule.num_units, schedule.num_workers)
    us = sum(
        max(unit_us, hbm_us * busy / schedule.num_units)
        for busy in [schedule.num_workers] * turns + [rest] * (rest > 0)
    )
    if schedule.num_parts > 1:
        us += 2 * 4 * schedule.num_parts * schedule.m * schedule.n / L2_BYTES + LAUNCH_US
    return us


def _divide(value: Index, by: int) -> tuple[jax.Array, jax.Array]:
    return lax.div(value, jnp.int32(by)), lax.rem(value, jnp.int32(by))
