"""Sums the partial products of one tile that the CTAs of a cluster have, each from its share of K, within the cluster.

Each CTA sends every other one the columns that the other will finish, straight into its shared memory, and adds up what
it receives in the order of the shares: the same bits each time. 64 rows of 128 columns are 32 KB in and out of each CTA,
whatever the number of shares; nothing goes through device memory, and no second launch adds it up.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.compat import WGMMA, Ref, Target
from pallas_kernels.storage import BLOCK

# Name of the axis of a cluster over the CTAs that share a tile's K.
SHARE = "share"
ROWS = 64


class Exchange(NamedTuple):
    """Scratch of one CTA.

    Attributes:
      received: From each share, for each warpgroup, [split, warpgroups, 64, columns] float32.
      arrived: For each warpgroup: all shares have arrived.
      read: For each warpgroup: those of all CTAs have read theirs, so that more may be sent.
      parts: In the interpreter, which cannot access another CTA's shared memory: device memory instead, for the whole
        tile, [split, warpgroups, 64, 128].
    """

    received: Ref
    arrived: Ref
    read: Ref
    parts: Ref | None = None


def scratch(target: Target, split: int, num_warpgroups: int) -> list[object]:
    """The fields of `Exchange` up to `read`, in order."""
    columns = BLOCK // split
    tile = min(columns, 128 // 4)
    transforms = plgpu.TilingTransform((8, tile)), plgpu.SwizzleTransform(4 * tile)
    told = plgpu.ClusterBarrier(collective_axes=(SHARE,), num_barriers=num_warpgroups)
    return [
        plgpu.SMEM((split, num_warpgroups, ROWS, columns), jnp.float32, transforms=transforms),
        told if target.interpret else plgpu.Barrier(num_arrivals=split, num_barriers=num_warpgroups),
        told,
    ]


def add_shares(
    target: Target, exchange: Exchange, total: jax.Array, warpgroup: jax.Array, is_first: jax.Array
) -> jax.Array:
    """This CTA's columns of the sum of all shares, float32 [64, columns].

    Args:
      target: Interpreter or GPU.
      exchange: Buffers and barriers.
      total: This CTA's share of the sum, [64, 128].
      warpgroup: The one with these rows of the tile, in all CTAs.
      is_first: Whether this is its first tile: nothing was sent before.
    """
    split, columns = exchange.received.shape[0], exchange.received.shape[3]
    rank = lax.axis_index(SHARE)
    pl.when(jnp.logical_not(is_first))(lambda: plgpu.barrier_wait(exchange.read.at[warpgroup]))
    if exchange.parts is not None:
        exchange.parts.at[rank, warpgroup][...] = total
        plgpu.barrier_arrive(exchange.arrived.at[warpgroup])
    else:
        for peer in range(split):
            plgpu.async_store_smem(
                total[:, peer * columns : (peer + 1) * columns],
                exchange.received.at[rank, warpgroup],
                exchange.arrived.at[warpgroup],
                cluster_idx=jnp.int32(peer),
                cluster_dim=SHARE,
            )
    plgpu.barrier_wait(exchange.arrived.at[warpgroup])

    def load(share: int) -> jax.Array:
        if exchange.parts is not None:
            return exchange.parts[share, warpgroup, :, pl.ds(rank * columns, columns)]
        return target.load(exchange.received.at[share, warpgroup], WGMMA)

    result = functools.reduce(jnp.add, (load(share) for share in range(split)))
    # One thread arrives at each CTA: all of the warpgroup must have read by then.
    plgpu.commit_smem()
    plgpu.barrier_arrive(exchange.read.at[warpgroup])
    return result


def finish(exchange: Exchange, warpgroup: jax.Array, has_tiles: jax.Array) -> None:
    """Call at the end: no CTA may exit while another still sends to it, or signals that it has read."""
    pl.when(has_tiles)(lambda: plgpu.barrier_wait(exchange.read.at[warpgroup]))
