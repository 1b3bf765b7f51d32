"""The work of each block in `fp8_matmul`: tiles of the output, split along K if there are too few of them for the GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.storage import BLOCK

# A loop index: traced, or plain if nothing is traced.
Index = jax.Array | int
NUM_SMS = 132
# The choices: rows of a tile, 64 for each multiplying warpgroup; CTAs that split a tile's K; and CTAs
# that share their copies of x, which pays off if x is large.
CHOICES = (
    *((rows, split, 1) for rows in (64, 128) for split in (1, 2, 4, 8)),
    *((rows, split, 2) for rows in (64, 128) for split in (1, 2, 4)),
    (192, 1, 2),
)
# Most CTAs in a cluster.
MAX_CLUSTER = 8
# Row tiles that run concurrently in a large product: 10 x 192 rows and 13 x 128 columns reuse their loads most.
GROUP = 10
# Assumptions for the choice between tiles, for one multiprocessor of an H100: FLOP/us that promotion leaves of the
# peak, bytes/us from L2; bytes/us from HBM for the GPU; and us until a cluster has added up a tile. From the data sheet
# and published kernels, not measured here; `tools/gpu_check` measures the choice itself.
SM_FLOPS, SM_BYTES, HBM_BYTES, EXCHANGE_US = 10.5e6, 40e3, 3.0e6, 1.0
# Multiprocessors come in groups of 16 or 18, within which a cluster must fit.
GROUP_SMS = 16


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Output tiles of block_m x (128 cluster), each of `depth` blocks of 128 columns of K, distributed over `num_workers`.

    A worker is a CTA, or a cluster of split x cluster of them: `cluster` with 128 columns each, which share rows of x, and
    `split` of each that split its K, see `exchange`.
    """

    m: int
    n: int
    depth: int
    block_m: int
    num_workers: int
    cluster: int
    split: int

    @property
    def row_tiles(self) -> int:
        return -(-self.m // self.block_m)

    @property
    def column_tiles(self) -> int:
        return -(-self.n // (BLOCK * self.cluster))

    @property
    def num_tiles(self) -> int:
        return self.row_tiles * self.column_tiles

    @property
    def share(self) -> int:
        """The most blocks of a tile that one CTA has."""
        return -(-self.depth // self.split)

    def place(self, tile: Index) -> tuple[jax.Array, jax.Array]:
        """Row tile and column tile; GROUP row tiles form a group, in which columns are slowest."""
        group_rows = min(GROUP, self.row_tiles)
        group, rest = _divide(tile, group_rows * self.column_tiles)
        first_row = group * group_rows
        rows = jnp.minimum(self.row_tiles - first_row, group_rows)
        return first_row + lax.rem(rest, rows), lax.div(rest, rows)

    def for_each_tile(
        self, worker: Index, rank: Index, visit: Callable[[Index, Index, Index, Index], None]
    ) -> jax.Array:
        """Calls visit(tile, start, stop, done) for the work of CTA `rank` of `worker`, in order: blocks start..stop.

        `done` counts the previous blocks. Returns the total.
        """
        start = lax.div(rank * self.depth, jnp.int32(self.split))
        stop = lax.div((rank + 1) * self.depth, jnp.int32(self.split))

        def run_tile(turn: Index, done: Index) -> jax.Array:
            visit(worker + turn * self.num_workers, start, stop, done)
            return done + stop - start

        turns = lax.div(self.num_tiles - worker + self.num_workers - 1, jnp.int32(self.num_workers))
        return lax.fori_loop(jnp.int32(0), turns, run_tile, jnp.int32(0))


def make(m: int, n: int, k: int, *, block_m: int, split_k: int, cluster: int, num_ctas: int = NUM_SMS) -> Schedule:
    """A schedule with tiles of `block_m` rows, `cluster` of them side by side, each split along K among `split_k` CTAs.

    Raises:
      ValueError: For an impossible cluster.
    """
    size = split_k * cluster
    if BLOCK % split_k or size > MAX_CLUSTER:
        raise ValueError(
            f"fp8_matmul splits a tile's K among 1, 2, 4 or 8 CTAs, at most {MAX_CLUSTER} in a cluster; "
            f"not among {split_k} with {cluster} tiles in a cluster"
        )
    usable = num_ctas if size <= 2 else num_ctas // GROUP_SMS * GROUP_SMS
    return Schedule(m, n, -(-k // BLOCK), block_m, max(usable // size, 1), cluster, split_k)


def default_blocks(m: int, n: int, k: int) -> dict[str, int]:
    """The one of `CHOICES` that should take the least time, by bytes and FLOPs."""
    choices = [dict(zip(("block_m", "split_k", "cluster"), choice, strict=True)) for choice in CHOICES]
    return min(choices, key=lambda choice: estimate_us(make(m, n, k, **choice)))


def estimate_us(schedule: Schedule) -> float:
    """Expected microseconds for bytes and FLOPs, wave by wave: the last one may have work for only a few."""
    # One warpgroup of products does not hide its own promotion; two do.
    flops = 2 * schedule.block_m * BLOCK * BLOCK * (1.6 if schedule.block_m == 64 else 1.0)
    loaded = (min(schedule.block_m, schedule.m) / schedule.cluster + BLOCK) * BLOCK
    tile_us = schedule.share * max(flops / SM_FLOPS, loaded / SM_BYTES) + (EXCHANGE_US if schedule.split > 1 else 0)
    hbm_us = (schedule.m + schedule.n) * schedule.depth * BLOCK / HBM_BYTES
    turns, rest = divmod(schedule.num_tiles, schedule.num_workers)
    return sum(
        max(tile_us, hbm_us * busy / schedule.num_tiles)
        for busy in [schedule.num_workers] * turns + [rest] * (rest > 0)
    )


def _divide(value: Index, by: int) -> tuple[jax.Array, jax.Array]:
    return lax.div(value, jnp.int32(by)), lax.rem(value, jnp.int32(by))
