"""Moving rows between the roles' devices within one process: explicit copies from device to device.

A micro-batch's rows are cut into equal pieces, a multiple of both device counts. A piece is on one attention
device and goes to one FFN device, and back. On either side array i holds the i-th piece of each device.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jaxtyping import Array, UInt8

from step3_jax.afd.topology import AfdTopology
from step3_jax.mesh import Layout

Pieces = tuple[UInt8[Array, "rows bytes"], ...]


class Exchange:
    """The copies between the two roles."""

    def __init__(self, topology: AfdTopology) -> None:
        """Takes the devices of both roles."""
        self._topology = topology

    def to_ffn(self, pieces: Sequence[UInt8[Array, "rows bytes"]]) -> Pieces:
        """From arrays over the attention devices to arrays over the FFN devices."""
        return _move(pieces, self._topology.attention, self._topology.ffn)

    def to_attention(self, pieces: Sequence[UInt8[Array, "rows bytes"]]) -> Pieces:
        """The other direction."""
        return _move(pieces, self._topology.ffn, self._topology.attention)


def _move(arrays: Sequence[UInt8[Array, "rows bytes"]], source: Layout, target: Layout) -> Pieces:
    sources, targets = list(source.mesh.devices.flat), list(target.mesh.devices.flat)
    shards = [{shard.device: shard.data for shard in array.addressable_shards} for array in arrays]
    # In row order: all pieces of a device are adjacent.
    pieces = [own[device] for device in sources for own in shards]
    each = len(pieces) // len(targets)
    moved = jax.device_put(pieces, [device for device in targets for _ in range(each)])
    rows, columns = pieces[0].shape
    sharding = target.sharding("rows")
    return tuple(
        jax.make_array_from_single_device_arrays((rows * len(targets), columns), sharding, moved[index::each])
        for index in range(each)
    )
