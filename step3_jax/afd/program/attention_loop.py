"""What an attention device does in executor `program`: complete calls, inside `jax.shard_map` over the union mesh."""

from __future__ import annotations

import functools
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from pallas_kernels.storage import PAGE_SIZE
from step3_jax.afd.microbatch import merge_stacked, split_chunk, stack_rows
from step3_jax.afd.payload import PayloadFormat
from step3_jax.afd.program.call import Numbers, Observe
from step3_jax.afd.program.report import gather_report
from step3_jax.afd.program.tick import Layers, Number, Segment, pick, stack
from step3_jax.afd.program.wire import Slots, Wire
from step3_jax.afd.roles import (
    Ends,
    Parts,
    Tokens,
    add_returned,
    attention_step,
    begin_step,
    token_logits,
)
from step3_jax.afd.topology import UNION, AfdTopology
from step3_jax.cache.paged import Cache, count_pages
from step3_jax.config import TextConfig
from step3_jax.engine.state import (
    RUNNING,
    DecodeBatch,
    PrefillBatch,
    Report,
    RowState,
    StepTokens,
    begin_rows,
    leaving_rows,
    next_tokens,
    place_tokens,
    verify_tokens,
)
from step3_jax.layers.attention import AttentionContext, CacheStep, with_plan
from step3_jax.layout.schedule import Schedule
from step3_jax.model.text import AttentionBlock
from step3_jax.sampling.batch import SamplingBatch
from step3_jax.sampling.speculation import Speculation

Batch = TypeVar("Batch", PrefillBatch, DecodeBatch, SamplingBatch)


class AttentionWeights(NamedTuple):
    """Arrays of the attention side from `roles.take_apart`: those of the ends, and of each layer or stack."""

    ends: list[Array]
    layers: list[list[Array]]


# Whether any row runs, and whether one of them ends the call; see `Wire.is_over`.
Status = tuple[Bool[Array, ""], Bool[Array, ""]]


class _Way(NamedTuple):
    """What a loop over ticks carries, besides the residual stream.

    Attributes:
      cache: The pool.
      pending: Rows that wait for their exchange.
      arrived: What the last exchange brought.
    """

    cache: Cache
    pending: UInt8[Array, "rows row_bytes"]
    arrived: Slots


# The residual stream of each micro-batch, without the output of the last FFN half.
Streams = Float[Array, "n B T D"]


class _Loop(NamedTuple):
    """What the decode loop carries from one rotation, in which each micro-batch passes all layers, to the next.

    Attributes:
      step: Rotations so far.
      is_over: Whether to leave.
      rows: State of the rows of all micro-batches, stacked.
      tokens: Their tokens in the current step.
      hidden: Residual streams of micro-batches that are on their way through the last layer.
      way: What the loops over ticks carry.
    """

    step: Int[Array, ""]
    is_over: Bool[Array, ""]
    rows: RowState
    tokens: StepTokens
    hidden: Streams
    way: _Way


class _Part(NamedTuple):
    """Micro-batches of a decode call, stacked, or one of them."""

    batch: DecodeBatch
    sampling: SamplingBatch


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
          num_microbatches: Micro-batches in flight.
          dtype: The dtype of activations.
          observe: Called with each decode step; None for no calls.
        """
        self._ends = parts.ends.skeleton
        self._parts = parts.attention
        self._config = config
        self._topology = topology
        self._form = form
        self.num_microbatches = num_microbatches
        self._dtype = dtype
        self._observe = observe

    def prefill(self, weights: AttentionWeights, cache: Cache, batch: PrefillBatch) -> Cache:
        """Prefills a chunk of prompts into the cache; nothing is in flight when it returns.

        Args:
          weights: This device's weights.
          cache: This device's cache.
          batch: The chunk of all devices, the same on each.
        """
        ends, layers = self._ends.build(weights.ends), Layers(self._parts, weights.layers)
        own = self._own_rows(batch._replace(features=None), cache)._replace(features=batch.features)
        parts = split_chunk(own, self.num_microbatches)
        schedule, num_tokens = Schedule(layers.count, len(parts)), parts[0].token_ids.shape[0]
        wire = Wire(self._topology, self._form, num_tokens)
        tokens = stack([self._begin_chunk(ends, part) for part in parts])
        last = layers.count - 1

        def take(
            segment: Segment[AttentionBlock], layer: Number, index: Int[Array, ""], carry: tuple[_Way, Streams]
        ) -> tuple[_Way, Streams]:
            context = pick(tokens.context, index)
            return self._take_item(segment, layer, index, context, *carry, wire, schedule)

        start = _Way(cache, self._no_rows(num_tokens), wire.empty()), tokens.hidden
        way, hidden = layers.over_items(range(last * len(parts)), len(parts), take, start)

        def fill(pool: Cache, given: tuple[Float[Array, "1 T D"], AttentionContext, Slots]) -> tuple[Cache, None]:
            # Only the cache of the last layer is needed; the compiler drops the rest.
            hidden, context, arrived = given
            (segment,) = layers.cut(last, last + 1)
            return self._attend(segment, last, Tokens(hidden, wire.outputs(arrived), context), pool)[2], None

        # With one layer nothing was sent, and nothing comes back.
        arrived = self._drain(way, wire, schedule) if last else stack([wire.empty()] * len(parts))
        return jax.lax.scan(fill, way.cache, (hidden, tokens.context, arrived))[0]

    def decode(
        self,
        weights: AttentionWeights,
        cache: Cache,
        batch: DecodeBatch,
        sampling: SamplingBatch,
        numbers: Numbers,
        leave_early: Bool[Array, ""],
        *,
        max_steps: int,
        speculation: Speculation | None = None,
    ) -> tuple[Cache, Report, Int[Array, ""]]:
        """Takes up to `numbers.num_steps` steps of each active row, as `engine.decode_loop` does.

        Whether rows have ended is known one step late, so a call may take one more step, in which they do nothing. With
        speculation every step has the same number of tokens of a row, with guesses or without, as the FFN side is not told.

        Args:
          weights: This device's weights.
          cache: This device's cache.
          batch: The rows of all devices, the same on each.
          sampling: Parameters of all rows.
          numbers: How many steps.
          leave_early: Whether to leave soon after a row has ended.
          max_steps: Tokens of a row that the report has room for.
          speculation: How tokens are guessed; None for one token a step.

        Returns:
          The cache, the report of all devices' rows, and the steps taken.
        """
        ends, layers = self._ends.build(weights.ends), Layers(self._parts, weights.layers)
        own, own_sampling = self._own_rows(batch, cache), self._own_rows(sampling, None)
        num_rows = own.last.shape[0]
        parts = _Part(*stack_rows((own, own_sampling), num_rows, self.num_microbatches))
        count, size = parts.batch.last.shape
        width = 1 if speculation is None else speculation.width
        schedule, wire = Schedule(layers.count, count), Wire(self._topology, self._form, size * width)

        def end(
            part: _Part, rows: RowState, tokens: StepTokens, hidden: Float[Array, "B T D"], arrived: Slots
        ) -> RowState:
            """Chooses a micro-batch's tokens, once the output of its last layer has arrived."""
            logits = token_logits(ends, add_returned(self._form, hidden, wire.outputs(arrived)))
            return verify_tokens(rows, logits, tokens, part.batch, part.sampling)

        def rotate(loop: _Loop) -> _Loop:
            (first,) = layers.cut(0, 1)

            def begin(
                carry: tuple[_Way, Status], given: tuple[_Part, RowState, StepTokens, Float[Array, "B T D"]]
            ) -> tuple[tuple[_Way, Status], tuple[RowState, StepTokens, Float[Array, "B T D"], AttentionContext]]:
                """A micro-batch's first layer, after the head and sampling of the step before."""
                (way, (runs, leaves)), (part, rows, tokens, hidden) = carry, given
                # What has arrived belongs to the step before, and the first rotation has no such step.
                rows = jax.lax.cond(
                    loop.step > 0, end, lambda part, rows, *_: rows, part, rows, tokens, hidden, way.arrived
                )
                runs |= jnp.any(rows.report.finish == RUNNING)
                leaves |= jnp.any(leaving_rows(rows, part.batch, leave_early))
                tokens = next_tokens(rows, part.batch, part.sampling, speculation)
                begun = self._begin(ends, tokens, place_tokens(rows, part.batch, tokens), way.cache)
                residual, fresh, pool = self._attend(first, 0, begun, way.cache)
                arrived = self._exchange(way, fresh, wire, schedule, (runs, leaves))
                return (_Way(pool, fresh, arrived), (runs, leaves)), (rows, tokens, residual, begun.context)

            no = jnp.zeros((), bool)
            (way, status), (rows, tokens, hidden, contexts) = jax.lax.scan(
                begin, (loop.way, (no, no)), (parts, loop.rows, loop.tokens, loop.hidden)
            )

            def take(
                segment: Segment[AttentionBlock], layer: Number, index: Int[Array, ""], carry: tuple[_Way, Streams]
            ) -> tuple[_Way, Streams]:
                context = pick(contexts, index)
                return self._take_item(segment, layer, index, context, *carry, wire, schedule, status)

            way, hidden = layers.over_items(range(count, layers.count * count), count, take, (way, hidden))
            num_exchanges = (loop.step + 1) * schedule.num_ticks
            wire.tell(self._observe, numbers.first_step + loop.step, num_exchanges, way.arrived)
            return _Loop(loop.step + 1, wire.is_over(way.arrived), rows, tokens, hidden, way)

        def finish(
            _: None, given: tuple[_Part, RowState, StepTokens, Float[Array, "B T D"], Slots]
        ) -> tuple[None, RowState]:
            return None, end(*given)

        begin_all = functools.partial(
            begin_rows, vocab_size=self._config.vocab_size, max_steps=max_steps, speculation=speculation
        )
        hidden = jnp.zeros((count, size, width, self._config.hidden_size), self._dtype)
        loop = _Loop(
            jnp.zeros((), jnp.int32),
            jnp.zeros((), bool),
            jax.vmap(begin_all)(parts.batch),
            StepTokens(jnp.zeros((count, size, width), jnp.int32), jnp.ones((count, size), jnp.int32)),
            hidden,
            _Way(cache, self._no_rows(size * width), wire.empty()),
        )
        loop = jax.lax.while_loop(lambda loop: (loop.step < numbers.num_steps) & ~loop.is_over, rotate, loop)
        given = parts, loop.rows, loop.tokens, loop.hidden, self._drain(loop.way, wire, schedule)
        _, rows = jax.lax.scan(finish, None, given)
        report = merge_stacked(rows.report, num_rows)
        return loop.way.cache, gather_report(report, self._topology), loop.step

    def _own_rows(self, batch: Batch, cache: Cache | None) -> Batch:
        """This device's part of a batch, with device-local page numbers."""
        index = jax.lax.axis_index(UNION)

        def cut(leaf: Array) -> Array:
            size = leaf.shape[0] // self._topology.num_attention
            return jax.lax.dynamic_slice_in_dim(leaf, index * size, size)

        own = jax.tree.map(cut, batch)
        if cache is None:
            return own
        return own._replace(table=own.table % count_pages(cache, self._config.num_hidden_layers))

    def _no_rows(self, count: int) -> UInt8[Array, "rows row_bytes"]:
        return jnp.zeros((count, self._form.row_bytes), jnp.uint8)

    def _begin_chunk(self, ends: Ends, part: PrefillBatch) -> Tokens:
        step = CacheStep(part.table, part.lengths, part.query_starts)
        rows = None if part.feature_rows is None else part.feature_rows[None]
        return begin_step(ends, self._config, self._form, part.token_ids[None], step, PAGE_SIZE, part.features, rows)

    def _begin(self, ends: Ends, tokens: StepTokens, step: CacheStep, cache: Cache) -> Tokens:
        begun = begin_step(ends, self._config, self._form, tokens.ids, step, PAGE_SIZE)
        # Made once for all layers; every attention device has all heads.
        context = with_plan(begun.context, cache, tokens.ids.shape[1], self._config.num_attention_heads)
        return begun._replace(context=context)

    def _take_item(
        self,
        segment: Segment[AttentionBlock],
        layer: Number,
        index: Int[Array, ""],
        context: AttentionContext,
        way: _Way,
        hidden: Streams,
        wire: Wire,
        schedule: Schedule,
        status: Status | tuple[()] = (),
    ) -> tuple[_Way, Streams]:
        """A tick: one layer of one micro-batch, overlapped with the exchange."""
        tokens = Tokens(pick(hidden, index), wire.outputs(way.arrived), context)
        residual, fresh, cache = self._attend(segment, layer, tokens, way.cache)
        hidden = jax.lax.dynamic_update_index_in_dim(hidden, residual, index, 0)
        return _Way(cache, fresh, self._exchange(way, fresh, wire, schedule, status)), hidden

    def _attend(
        self, segment: Segment[AttentionBlock], layer: Number, tokens: Tokens, cache: Cache
    ) -> tuple[Float[Array, "B T D"], UInt8[Array, "rows row_bytes"], Cache]:
        """A layer's attention half."""
        layer_pages = count_pages(cache, self._config.num_hidden_layers)
        with jax.named_scope(segment.scope):
            return attention_step(segment.build(layer), self._form, tokens, cache, layer, layer_pages)

    def _exchange(
        self,
        way: _Way,
        fresh: UInt8[Array, "rows row_bytes"],
        wire: Wire,
        schedule: Schedule,
        status: Status | tuple[()],
    ) -> Slots:
        """What has arrived by the time the next item can be computed."""
        arrived = wire.from_attention(way.pending if schedule.attention_lag else fresh, way.arrived, *status)
        for _ in range(schedule.num_idle_ticks):
            arrived = wire.from_attention(fresh, arrived, *status)
        return arrived

    def _drain(self, way: _Way, wire: Wire, schedule: Schedule) -> UInt8[Array, "n N slot"]:
        """The last layer's FFN output for each micro-batch; the first one's is here already."""
        arrived = [way.arrived]
        for _ in range(schedule.num_last_exchanges):
            arrived.append(wire.from_attention(way.pending, arrived[-1]))
        return jnp.stack(arrived)
