"""What an attention device does in executor `program`: all of a call, inside `jax.shard_map` over the union mesh."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from pallas_kernels.pages import KVPages
from pallas_kernels.storage import PAGE_SIZE
from step3_jax.afd.microbatch import merge_reports, split_chunk, split_decode
from step3_jax.afd.payload import PayloadFormat
from step3_jax.afd.program.call import Numbers, Observe
from step3_jax.afd.program.report import gather_report
from step3_jax.afd.program.wire import Slots, Wire
from step3_jax.afd.roles import (
    Ends,
    Parts,
    Tokens,
    add_returned,
    attention_step,
    begin_step,
    last_logits,
)
from step3_jax.afd.topology import UNION, AfdTopology
from step3_jax.cache.paged import Cache, count_pages
from step3_jax.config import TextConfig
from step3_jax.engine.state import (
    FULL,
    RUNNING,
    STOPPED,
    DecodeBatch,
    PrefillBatch,
    Report,
    RowState,
    begin_rows,
    choose_tokens,
    step_lengths,
)
from step3_jax.layers.attention import CacheStep
from step3_jax.layout.schedule import Schedule
from step3_jax.model.text import AttentionBlock
from step3_jax.sampling.batch import SamplingBatch

Batch = TypeVar("Batch", PrefillBatch, DecodeBatch, SamplingBatch)


class AttentionWeights(NamedTuple):
    """Arrays of the attention side, as `roles.take_apart` leaves them: of the ends, and of each layer."""

    ends: list[Array]
    layers: list[list[Array]]


class _Loop(NamedTuple):
    """What the decode loop carries from one rotation to the next.

    Attributes:
      step: Rotations so far.
      is_over: Whether to leave.
      cache: Pages of all layers.
      rows: Of each micro-batch.
      hidden: The residual stream of each micro-batch, on its way through the last layer.
      pending: Rows that wait for their exchange.
      arrived: By the last exchange.
    """

    step: Int[Array, ""]
    is_over: Bool[Array, ""]
    cache: Cache
    rows: list[RowState]
    hidden: list[Float[Array, "B 1 D"]]
    pending: UInt8[Array, "rows row_bytes"]
    arrived: Slots


class AttentionLoop:
    """The attention side's programs.

    Attributes:
      num_microbatches: Parts of a batch in flight.
    """

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
        """Takes the modules; their arrays come with each call.

        Args:
          parts: The model.
          config: Its sizes.
          topology: All devices.
          form: What crosses.
          num_microbatches: In flight.
          dtype: Of activations.
          observe: Hears of each decode step; None for nobody.
        """
        self._ends = parts.ends.skeleton
        self._layers = [part.skeleton for part in parts.attention]
        self._config = config
        self._topology = topology
        self._form = form
        self.num_microbatches = num_microbatches
        self._dtype = dtype
        self._observe = observe

    def prefill(self, weights: AttentionWeights, cache: Cache, batch: PrefillBatch) -> Cache:
        """Reads a chunk of prompts into the cache; what is on its way has come back before it returns.

        Args:
          weights: Of this device.
          cache: Of this device.
          batch: The chunk of all devices; all have the same.
        """
        ends, blocks = self._build(weights)
        own = self._own_rows(batch._replace(features=None), cache)._replace(features=batch.features)
        parts = split_chunk(own, self.num_microbatches)
        schedule = Schedule(len(blocks), len(parts))
        wire = Wire(self._topology, self._form, parts[0].token_ids.shape[0])
        pages, arrived = cache, wire.empty()
        tokens = [self._begin_chunk(ends, part) for part in parts]
        pending = jnp.zeros((parts[0].token_ids.shape[0], self._form.row_bytes), jnp.uint8)
        for tick in range(schedule.num_ticks):
            fresh = pending
            if (item := schedule.attention_item(tick)) is not None:
                layer, index = item
                if layer:
                    tokens[index] = tokens[index]._replace(returned=wire.outputs(arrived))
                # Of the last layer nothing but the cache is wanted: what the exchanges still carry nobody reads.
                is_last = layer == len(blocks) - 1
                before = None if is_last else pending
                residual, rows, pages = self._attend(blocks, layer, tokens[index], pages, before)
                if not is_last:
                    tokens[index], fresh = tokens[index]._replace(hidden=residual), rows
            if tick < schedule.num_chunk_exchanges:
                arrived = wire.from_attention(pending if schedule.attention_lag else fresh, arrived)
                pending = fresh
        return pages

    def decode(
        self,
        weights: AttentionWeights,
        cache: Cache,
        batch: DecodeBatch,
        sampling: SamplingBatch,
        numbers: Numbers,
        *,
        max_steps: int,
    ) -> tuple[Cache, Report, Int[Array, ""]]:
        """Makes up to `numbers.num_steps` tokens of each active row, as `engine.state.decode_loop` does.

        That rows have ended is known one step late: a call may take a step more, in which they do nothing.

        Args:
          weights: Of this device.
          cache: Of this device.
          batch: The rows of all devices; all have the same.
          sampling: Of all rows.
          numbers: How many steps, and when to leave.
          max_steps: Tokens of a row that the report has room for.

        Returns:
          The cache, the report of all devices' rows, and the steps taken.
        """
        ends, blocks = self._build(weights)
        own, own_sampling = self._own_rows(batch, cache), self._own_rows(sampling, None)
        parts = split_decode(own, own_sampling, self.num_microbatches)
        schedule = Schedule(len(blocks), len(parts))
        num_rows = parts[0][0].last.shape[0]
        wire = Wire(self._topology, self._form, num_rows)
        vocab_size = self._config.vocab_size

        def end(index: int, rows: RowState, hidden: Float[Array, "B 1 D"], arrived: Slots) -> RowState:
            """Tokens of a micro-batch, once its last layer has come back."""
            logits = last_logits(ends, add_returned(self._form, hidden, wire.outputs(arrived)))
            return choose_tokens(rows, logits, *parts[index])

        def rotate(loop: _Loop) -> _Loop:
            pages, rows, hidden = loop.cache, list(loop.rows), list(loop.hidden)
            pending, arrived = loop.pending, loop.arrived
            tokens: list[Tokens] = []
            for tick in range(schedule.num_ticks):
                fresh = pending
                if (item := schedule.attention_item(tick)) is not None:
                    layer, index = item
                    if layer:
                        tokens[index] = tokens[index]._replace(returned=wire.outputs(arrived))
                    else:
                        # What came back is the step before's, of which the first rotation has none.
                        rows[index] = jax.lax.cond(
                            loop.step > 0,
                            lambda *given, index=index: end(index, *given),
                            lambda rows, hidden, arrived: rows,
                            rows[index],
                            hidden[index],
                            arrived,
                        )
                        tokens.append(self._begin(ends, rows[index], parts[index][0]))
                    residual, fresh, pages = self._attend(blocks, layer, tokens[index], pages, pending)
                    tokens[index] = tokens[index]._replace(hidden=residual)
                # Only by the last exchange is anything asked of the rows.
                status = _status(rows) if tick == schedule.num_ticks - 1 else ()
                arrived = wire.from_attention(pending if schedule.attention_lag else fresh, arrived, *status)
                pending = fresh
            wire.tell(self._observe, numbers.first_step + loop.step, (loop.step + 1) * schedule.num_ticks, arrived)
            is_over = wire.is_over(arrived, numbers.leave_early)
            after = [one.hidden for one in tokens]
            return _Loop(loop.step + 1, is_over, pages, rows, after, pending, arrived)

        hidden = jnp.zeros((num_rows, 1, self._config.hidden_size), self._dtype)
        loop = _Loop(
            jnp.zeros((), jnp.int32),
            jnp.zeros((), bool),
            cache,
            [begin_rows(part, vocab_size=vocab_size, max_steps=max_steps) for part, _ in parts],
            [hidden] * len(parts),
            jnp.zeros((num_rows, self._form.row_bytes), jnp.uint8),
            wire.empty(),
        )
        loop = jax.lax.while_loop(lambda loop: (loop.step < numbers.num_steps) & ~loop.is_over, rotate, loop)
        rows, arrived = list(loop.rows), loop.arrived
        for index in range(len(parts)):
            rows[index] = end(index, rows[index], loop.hidden[index], arrived)
            if index < schedule.num_last_exchanges:
                arrived = wire.from_attention(loop.pending, arrived)
        report = merge_reports([row.report for row in rows], own.last.shape[0])
        return loop.cache, gather_report(report, self._topology), loop.step

    def _build(self, weights: AttentionWeights) -> tuple[Ends, list[AttentionBlock]]:
        blocks = [skeleton.build(leaves) for skeleton, leaves in zip(self._layers, weights.layers, strict=True)]
        return self._ends.build(weights.ends), blocks

    def _own_rows(self, batch: Batch, cache: Cache | None) -> Batch:
        """This device's part of a batch, its page numbers as the device counts them."""
        index = jax.lax.axis_index(UNION)

        def cut(leaf: Array) -> Array:
            size = leaf.shape[0] // self._topology.num_attention
            return jax.lax.dynamic_slice_in_dim(leaf, index * size, size)

        own = jax.tree.map(cut, batch)
        if cache is None:
            return own
        return own._replace(table=own.table % count_pages(cache, self._config.num_hidden_layers))

    def _begin_chunk(self, ends: Ends, part: PrefillBatch) -> Tokens:
        step = CacheStep(part.table, part.lengths, part.query_starts)
        rows = None if part.feature_rows is None else part.feature_rows[None]
        return begin_step(ends, self._config, self._form, part.token_ids[None], step, PAGE_SIZE, part.features, rows)

    def _begin(self, ends: Ends, rows: RowState, batch: DecodeBatch) -> Tokens:
        step = CacheStep(batch.table, step_lengths(rows, batch))
        return begin_step(ends, self._config, self._form, rows.last[:, None], step, PAGE_SIZE)

    def _attend(
        self,
        blocks: Sequence[AttentionBlock],
        layer: int,
        tokens: Tokens,
        pages: KVPages,
        before: UInt8[Array, "rows row_bytes"] | None,
    ) -> tuple[Float[Array, "B T D"], UInt8[Array, "rows row_bytes"], KVPages]:
        """A layer's attention half; it writes to the cache once `before`, the rows of the tick before, are known."""
        context = tokens.context
        if before is not None and context.page_ids is not None:
            # Else nothing orders this write behind the reading of the same pages for the micro-batch before, and XLA
            # copies them for the latter. What is added is 0, which XLA does not find out.
            zero = before[0, 0].astype(jnp.int32) >> 8
            tokens = tokens._replace(context=context._replace(page_ids=context.page_ids + zero))
        with jax.named_scope(f"layers.{layer}"):
            layer_pages = count_pages(pages, len(blocks))
            return attention_step(blocks[layer], self._form, tokens, pages, layer, layer_pages)


def _status(rows: Sequence[RowState]) -> tuple[Bool[Array, ""], Bool[Array, ""]]:
    """Whether some row runs, and whether one has ended."""
    finish = jnp.concatenate([row.report.finish for row in rows])
    return jnp.any(finish == RUNNING), jnp.any((finish == STOPPED) | (finish == FULL))
