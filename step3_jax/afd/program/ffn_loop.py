"""What an FFN device does in executor `program`: all of a call, inside `jax.shard_map` over the union mesh.

It receives all tokens that it computes a part of, and returns its part of each token's sum: the attention side adds
the parts, so that the FFN side needs no collective itself.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num, UInt8

from step3_jax.afd.microbatch import part_size
from step3_jax.afd.payload import PayloadFormat
from step3_jax.afd.program.call import Numbers, Observe
from step3_jax.afd.program.report import fill_report, gather_report
from step3_jax.afd.program.tick import Layers, Number, Segment
from step3_jax.afd.program.wire import Slots, Wire
from step3_jax.afd.roles import Parts, unpack_tokens
from step3_jax.afd.topology import UNION, AfdTopology
from step3_jax.config import TextConfig
from step3_jax.engine.state import Report
from step3_jax.layers.mlp import SwiGLU
from step3_jax.layers.moe import Experts
from step3_jax.layers.rows import Rows, map_tokens
from step3_jax.layout.schedule import Schedule
from step3_jax.layout.table import AXES
from step3_jax.mesh import Layout
from step3_jax.model.text import FfnBlock

FfnWeights = list[list[Array]]


class _Way(NamedTuple):
    """What a loop over ticks carries.

    Attributes:
      pending: Outputs that wait for their exchange.
      arrived: What the last exchange brought.
    """

    pending: UInt8[Array, "rows output_bytes"]
    arrived: Slots


class _Loop(NamedTuple):
    """What the decode loop carries from one rotation to the next.

    Attributes:
      step: Rotations so far.
      is_over: Whether to leave.
      way: What is in flight between the two sides.
    """

    step: Int[Array, ""]
    is_over: Bool[Array, ""]
    way: _Way


class FfnLoop:
    """The FFN side's programs."""

    def __init__(
        self,
        parts: Parts,
        config: TextConfig,
        topology: AfdTopology,
        form: PayloadFormat,
        num_microbatches: int,
        dtype: jnp.dtype,
        observe: Observe | None,
    ) -> None:
        """As for `AttentionLoop`."""
        self._parts = parts.ffn
        self._num_experts = config.moe_num_experts
        self._vocab_size = config.vocab_size
        self._topology = topology
        self._form = form
        self._num_microbatches = num_microbatches
        self._dtype = dtype
        self._observe = observe
        layout = topology.ffn
        # For each FFN device: its group of experts, and its copy of all other weights.
        self._expert_group = _coordinates(layout, layout.axes("experts"))
        widths = layout.axes("width")
        self._copy = _coordinates(layout, tuple(axis for axis in AXES if axis not in widths))
        self._num_copies = int(self._copy.max()) + 1

    def prefill(self, weights: FfnWeights, *, num_tokens: int) -> Slots:
        """The FFN side of a chunk of prompts, without the last layer, where it is not needed.

        Args:
          weights: This device's weights.
          num_tokens: Tokens of each attention device.

        Returns:
          What the last exchange brought, to wait for.
        """
        each, count = part_size(num_tokens, self._num_microbatches)
        layers = Layers(self._parts, weights)
        schedule, wire = Schedule(layers.count, count), Wire(self._topology, self._form, each)
        way = _Way(self._no_outputs(each), wire.empty())
        if layers.count == 1:
            return way.arrived
        for _ in range(schedule.num_late_items):
            way = way._replace(arrived=wire.from_ffn(way.pending, way.arrived))
        take = functools.partial(self._take_item, wire, schedule)
        way = layers.over_items(range((layers.count - 1) * count), count, take, way)
        return self._drain(way, wire, schedule)

    def decode(
        self,
        weights: FfnWeights,
        numbers: Numbers,
        *,
        num_rows: int,
        max_steps: int,
        num_guesses: int = 0,
    ) -> tuple[Report, Int[Array, ""]]:
        """The FFN side of a decode call.

        Args:
          weights: This device's weights.
          numbers: As for the attention side.
          num_rows: Rows of each attention device.
          max_steps: As for the attention side.
          num_guesses: Tokens of a row in a step besides its last one.

        Returns:
          The report of all attention devices' rows, and the steps taken.
        """
        each, count = part_size(num_rows, self._num_microbatches)
        layers = Layers(self._parts, weights)
        num_tokens = each * (1 + num_guesses)
        schedule, wire = Schedule(layers.count, count), Wire(self._topology, self._form, num_tokens)
        take = functools.partial(self._take_item, wire, schedule)
        num_items = layers.count * count
        num_own = num_items - schedule.num_late_items

        def rotate(loop: _Loop) -> _Loop:
            # The first ticks receive what the previous rotation sent.
            way = layers.over_items(range(num_own, num_items), count, take, loop.way)
            way = layers.over_items(range(num_own), count, take, way)
            num_exchanges = (loop.step + 1) * schedule.num_ticks
            wire.tell(self._observe, numbers.first_step + loop.step, num_exchanges, way.arrived)
            return _Loop(loop.step + 1, wire.is_over(way.arrived), way)

        way = _Way(self._no_outputs(num_tokens), wire.empty())
        loop = _Loop(jnp.zeros((), jnp.int32), jnp.zeros((), bool), way)
        loop = jax.lax.while_loop(lambda loop: (loop.step < numbers.num_steps) & ~loop.is_over, rotate, loop)
        way = layers.over_items(range(num_own, num_items), count, take, loop.way)
        # Its value is not used; the dependency keeps the gather after the last exchange.
        last = self._drain(way, wire, schedule)[0, -1].astype(jnp.int32)
        report = gather_report(fill_report(last, num_rows, max_steps, self._vocab_size, num_guesses), self._topology)
        return report, loop.step

    def _take_item(
        self,
        wire: Wire,
        schedule: Schedule,
        segment: Segment[FfnBlock],
        layer: Number,
        index: Int[Array, ""],
        way: _Way,
    ) -> _Way:
        """A tick: one layer of one micro-batch, overlapped with the exchange."""
        del index  # This side treats the rows of all micro-batches alike.
        pending, arrived = way
        for _ in range(schedule.num_idle_ticks):
            arrived = wire.from_ffn(pending, arrived)
        with jax.named_scope(segment.scope):
            fresh = self._feed(segment.build(layer), wire.rows(arrived))
        return _Way(fresh, wire.from_ffn(pending if schedule.ffn_lag else fresh, arrived))

    def _drain(self, way: _Way, wire: Wire, schedule: Schedule) -> Slots:
        """The last exchanges, in which nothing is computed."""
        arrived = way.arrived
        for _ in range(schedule.num_last_exchanges - schedule.num_late_items):
            arrived = wire.from_ffn(way.pending, arrived)
        return arrived

    def _no_outputs(self, num_rows: int) -> UInt8[Array, "rows output_bytes"]:
        return jnp.zeros((self._topology.num_attention * num_rows, self._form.output_bytes), jnp.uint8)

    def _feed(self, block: FfnBlock, rows: UInt8[Array, "rows row_bytes"]) -> UInt8[Array, "rows output_bytes"]:
        """This device's part of a layer's FFN half."""
        normed, experts, weights = unpack_tokens(block, self._form, rows, self._dtype)
        if block.mlp is not None:
            with jax.named_scope("mlp"):
                return self._form.pack_output(self._run_copy(block.mlp, normed))
        total = jnp.zeros(normed.shape, self._dtype)
        if block.moe is not None:
            with jax.named_scope("moe"):
                total += self._run_experts(block.moe, normed, weights, experts)
        if block.share_expert is not None:
            with jax.named_scope("share_expert"):
                total += self._run_copy(block.share_expert, normed)
        return self._form.pack_output(total)

    def _run_experts(
        self,
        inner: Experts,
        normed: Float[Array, "N D"] | Rows,
        weights: Float[Array, "N top_k"],
        experts: Int[Array, "N top_k"],
    ) -> Float[Array, "N D"]:
        """This device's part of the routed experts' sum; `ShardedExperts.sum_part` does it on a mesh of one side."""
        count = inner.gate_proj[...].shape[0]
        local = experts - self._place(self._expert_group) * count
        is_here = (local >= 0) & (local < count)
        weights, local = jnp.where(is_here, weights, 0), jnp.where(is_here, local, count)
        return inner(normed, weights, local, all_experts=self._num_experts)

    def _run_copy(self, module: SwiGLU, normed: Float[Array, "N D"] | Rows) -> Float[Array, "N D"]:
        """Weights with copies on several devices: each serves its part of the rows, and returns zeros for the others."""
        if self._num_copies == 1:
            return module(normed)
        num_rows = normed.shape[0]
        each = -(-num_rows // self._num_copies)
        missing = each * self._num_copies - num_rows
        first = self._place(self._copy) * each

        def cut(array: Num[Array, "N columns"]) -> Num[Array, "each columns"]:
            return jax.lax.dynamic_slice_in_dim(jnp.pad(array, ((0, missing), (0, 0))), first, each)

        out = module(map_tokens(normed, cut) if isinstance(normed, Rows) else cut(normed))
        everyone = jnp.zeros((num_rows + missing, out.shape[1]), out.dtype)
        return jax.lax.dynamic_update_slice_in_dim(everyone, out, first, 0)[:num_rows]

    def _place(self, table: Int[np.ndarray, " devices"]) -> Int[Array, ""]:
        return jnp.asarray(table)[jax.lax.axis_index(UNION) - self._topology.num_attention]


def _coordinates(layout: Layout, axes: Sequence[str]) -> Int[np.ndarray, " devices"]:
    """Index of each device along some axes of a mesh."""
    shape = layout.mesh.devices.shape
    places = np.indices(shape).reshape(len(shape), -1)
    picked = [AXES.index(axis) for axis in axes]
    sizes = [shape[axis] for axis in picked]
    if math.prod(sizes) == 1:
        return np.zeros((math.prod(shape),), np.int32)
    return np.ravel_multi_index(tuple(places[picked]), sizes).astype(np.int32)
