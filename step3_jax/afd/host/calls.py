"""The jitted calls of executor `host`: one program for each kind of stage, shared by all layers of the same structure.

Weights are arguments. Each call runs under `jax.shard_map` on the devices of its role, every device on its own rows.
"""

from __future__ import annotations

import collections
import functools
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from pallas_kernels.storage import PAGE_SIZE
from step3_jax.afd.host.exchange import Pieces
from step3_jax.afd.microbatch import merge_reports, split_chunk, split_decode
from step3_jax.afd.payload import PayloadFormat
from step3_jax.afd.roles import (
    Part,
    Tokens,
    Vision,
    attention_step,
    begin_step,
    end_step,
    ffn_step,
    take_apart,
)
from step3_jax.afd.topology import AfdTopology
from step3_jax.cache.paged import Cache, copy_pages, count_pages
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
from step3_jax.gpu import compiler_options
from step3_jax.layers.attention import AttentionContext, CacheStep
from step3_jax.mesh import Layout
from step3_jax.model.step3 import Step3
from step3_jax.model.text import AttentionBlock, FfnBlock
from step3_jax.sampling.batch import SamplingBatch
from step3_jax.sampling.speculation import Speculation

P = ParamSpec("P")
R = TypeVar("R")
M = TypeVar("M", bound=nnx.Module)

Leaves = list[Array]


class Flow(NamedTuple):
    """Tokens of a micro-batch on their way through the layers; see `roles.Tokens`."""

    hidden: Float[Array, "B T D"]
    returned: Pieces
    context: AttentionContext


class MicroBatch(NamedTuple):
    """One micro-batch of a decode call."""

    batch: DecodeBatch
    sampling: SamplingBatch
    rows: RowState


class LayerHalf(NamedTuple):
    """One role's half of a layer.

    Attributes:
      leaves: Its arrays, or those of the stack it is in.
      call: The call that runs it, shared by all layers of the same structure.
      numbers: The layer's index and its index in its stack, on the role's devices.
    """

    leaves: Leaves
    call: jax.stages.Wrapped
    numbers: Int[Array, " 2"]


class RoleCalls:
    """The calls for one model on one topology.

    Attributes:
      num_layers: L.
      num_microbatches: Parts of a batch in flight.
      compile_s: Seconds spent in calls that had to trace, up to their dispatch.
      num_traces: How often each call was traced, by name.
    """

    def __init__(self, model: Step3, topology: AfdTopology, form: PayloadFormat, num_microbatches: int) -> None:
        """Takes a model whose weights are placed as `topology.parameter` says."""
        self.compile_s = 0.0
        self.num_traces: collections.Counter[str] = collections.Counter()
        self._config = model.config
        self._topology = topology
        self._form = form
        self.num_microbatches = num_microbatches
        # A CPU computes in float32, even next to other devices.
        self._ffn_dtype = jnp.dtype(jnp.float32) if topology.ffn_platform == "cpu" else model.text.dtype
        # Pieces of a micro-batch on each device of a role.
        self._attention_pieces = topology.num_pieces // topology.num_attention
        self._ffn_pieces = topology.num_pieces // topology.num_ffn
        parts = take_apart(model)
        self.num_layers = model.config.text.num_hidden_layers
        self._ends = parts.ends
        self._vision = Vision(model, topology.tower)
        self._jit = _jit_for(topology.devices[0].platform)
        self._jit_on_ffn = _jit_for(topology.ffn_platform)
        self._attention = _list_halves(parts.attention, self._jit_attention, topology.attention)
        self._ffn = _list_halves(parts.ffn, self._jit_ffn, topology.ffn)
        self._make_jits()

    def begin_chunk(self, batch: PrefillBatch, pages_of_shard: int) -> list[Flow]:
        """Embeds a chunk of prompts, in micro-batches."""
        # The features are replicated; everything else is sharded.
        given = batch._replace(features=None), batch.features, np.int32(pages_of_shard)
        return self._timed("begin_chunk", self._begin_chunk, self._ends.leaves, *given)

    def split(
        self,
        batch: DecodeBatch,
        sampling: SamplingBatch,
        pages_of_shard: int,
        *,
        max_steps: int,
        speculation: Speculation | None,
    ) -> list[MicroBatch]:
        """The micro-batches of a decode call."""
        given = batch, sampling, np.int32(pages_of_shard), max_steps, speculation
        return self._timed("split", self._split, *given)

    def begin(self, own: MicroBatch, speculation: Speculation | None) -> tuple[StepTokens, Flow]:
        """The tokens of a step, and their embeddings on their way."""
        return self._timed("begin", self._begin, self._ends.leaves, *own, speculation)

    def attend(self, layer: int, flow: Flow, pages: Cache) -> tuple[Float[Array, "B T D"], Pieces, Cache]:
        """A layer's attention half: what stays, what goes to the FFN side, and the cache. `pages` are consumed."""
        half = self._attention[layer]
        given = flow.hidden, flow.returned, flow.context, pages, half.numbers
        return self._timed("attention", half.call, half.leaves, *given)

    def feed(self, layer: int, pieces: Pieces) -> Pieces:
        """A layer's FFN half."""
        half = self._ffn[layer]
        return self._timed("ffn", half.call, half.leaves, pieces, half.numbers)

    def end(self, own: MicroBatch, tokens: StepTokens, flow: Flow) -> tuple[RowState, Int[Array, "S 3"]]:
        """Head and sampling.

        Args:
          own: The micro-batch.
          tokens: Of the step.
          flow: After the last layer.

        Returns:
          The new state, and of each attention device how many rows run, and with how many the call ends: if it does not
          leave early, and if it does.
        """
        given = flow.hidden, flow.returned, flow.context, tokens, *own
        return self._timed("end", self._end, self._ends.leaves, *given)

    def merge(self, reports: Sequence[Report], rows_of_shard: int) -> Report:
        """The report of a whole batch."""
        return self._timed("merge", self._merge, list(reports), rows_of_shard)

    def encode_images(self, pixels: Float[np.ndarray, "images 3 S S"]) -> Float[Array, "images tokens D"]:
        """Features of squares, equally many for each attention device, or instance.

        Raises:
          ValueError: If the model has no vision tower.
        """
        return self._timed("encode_images", self._encode, self._vision.leaves, pixels)

    def copy_pages(
        self, cache: Cache, sources: Int[np.ndarray, " copies"], targets: Int[np.ndarray, " copies"]
    ) -> Cache:
        """Copies pages; each attention device numbers its own."""
        return self._timed("copy_pages", self._copy, cache, sources, targets)

    def attention_program(self, layer: int, flow: Flow, pages: Cache) -> jax.stages.Compiled:
        """The compiled attention step of a layer, for reading; flow and pages may be abstract, and are not consumed."""
        half = self._attention[layer]
        given = flow.hidden, flow.returned, flow.context, pages, half.numbers
        return half.call.lower(half.leaves, *given).compile()

    def _timed(self, name: str, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        num_traces, start = self.num_traces[name], time.perf_counter()
        result = call(*args, **kwargs)
        if self.num_traces[name] != num_traces:
            self.compile_s += time.perf_counter() - start
        return result

    def _jit_attention(self, part: Part[AttentionBlock]) -> jax.stages.Wrapped:
        layout = self._topology.attention
        rows = layout.spec("rows")
        run = jax.shard_map(
            functools.partial(self._run_attention, part),
            mesh=layout.mesh,
            in_specs=(PartitionSpec(), rows, rows, rows, rows, PartitionSpec()),
            out_specs=rows,
            check_vma=False,
        )
        return self._jit(run, donate_argnums=(1, 4))

    def _jit_ffn(self, part: Part[FfnBlock]) -> jax.stages.Wrapped:
        layout = self._topology.ffn
        rows = layout.spec("rows")
        run = jax.shard_map(
            functools.partial(self._run_ffn, part),
            mesh=layout.mesh,
            in_specs=([_spec(leaf) for leaf in part.leaves], rows, PartitionSpec()),
            out_specs=rows,
            check_vma=False,
        )
        return self._jit_on_ffn(run)

    def _make_jits(self) -> None:
        layout = self._topology.attention
        rows, copy = layout.spec("rows"), PartitionSpec()
        on_attention = functools.partial(jax.shard_map, mesh=layout.mesh, out_specs=rows, check_vma=False)
        self._begin_chunk = self._jit(on_attention(self._run_begin_chunk, in_specs=(copy, rows, copy, copy)))
        self._encode = self._jit(self._run_encode, out_shardings=layout.sharding())

        # `shard_map` takes no static arguments.
        def split(
            batch: DecodeBatch,
            sampling: SamplingBatch,
            pages: Int[Array, ""],
            max_steps: int,
            speculation: Speculation | None,
        ) -> list[MicroBatch]:
            run = functools.partial(self._run_split, max_steps=max_steps, speculation=speculation)
            return on_attention(run, in_specs=(rows, rows, copy))(batch, sampling, pages)

        def begin(
            leaves: Leaves,
            batch: DecodeBatch,
            sampling: SamplingBatch,
            state: RowState,
            speculation: Speculation | None,
        ) -> tuple[StepTokens, Flow]:
            run = functools.partial(self._run_begin, speculation=speculation)
            return on_attention(run, in_specs=(copy, rows, rows, rows))(leaves, batch, sampling, state)

        def merge(reports: list[Report], num_rows: int) -> Report:
            self.num_traces["merge"] += 1
            return on_attention(functools.partial(merge_reports, num_rows=num_rows), in_specs=(rows,))(reports)

        self._split = self._jit(split, static_argnums=(3, 4))
        self._begin = self._jit(begin, static_argnums=4)
        self._end = self._jit(on_attention(self._run_end, in_specs=(copy, *[rows] * 7)), donate_argnums=7)
        self._merge = self._jit(merge, static_argnums=1)
        self._copy = self._jit(on_attention(self._run_copy, in_specs=(rows, rows, rows)), donate_argnums=0)

    # The functions below are traced, on one device's own part; each counts its traces by a Python side effect.

    def _run_begin_chunk(
        self,
        leaves: Leaves,
        batch: PrefillBatch,
        features: Float[Array, "M D"] | None,
        pages_of_shard: Int[Array, ""],
    ) -> list[Flow]:
        self.num_traces["begin_chunk"] += 1
        ends = self._ends.skeleton.build(leaves)
        # Page numbers local to each device.
        batch = batch._replace(table=batch.table % pages_of_shard, features=features)
        return [
            self._cut(
                begin_step(
                    ends,
                    self._config.text,
                    self._form,
                    part.token_ids[None],
                    CacheStep(part.table, part.lengths, part.query_starts),
                    PAGE_SIZE,
                    part.features,
                    None if part.feature_rows is None else part.feature_rows[None],
                )
            )
            for part in split_chunk(batch, self.num_microbatches)
        ]

    def _run_split(
        self,
        batch: DecodeBatch,
        sampling: SamplingBatch,
        pages_of_shard: Int[Array, ""],
        *,
        max_steps: int,
        speculation: Speculation | None,
    ) -> list[MicroBatch]:
        self.num_traces["split"] += 1
        batch = batch._replace(table=batch.table % pages_of_shard)
        sizes = {"vocab_size": self._config.text.vocab_size, "max_steps": max_steps}
        return [
            MicroBatch(*part, begin_rows(part[0], **sizes, speculation=speculation))
            for part in split_decode(batch, sampling, self.num_microbatches)
        ]

    def _run_begin(
        self,
        leaves: Leaves,
        batch: DecodeBatch,
        sampling: SamplingBatch,
        rows: RowState,
        *,
        speculation: Speculation | None,
    ) -> tuple[StepTokens, Flow]:
        self.num_traces["begin"] += 1
        tokens = next_tokens(rows, batch, sampling, speculation)
        step = place_tokens(rows, batch, tokens)
        ends = self._ends.skeleton.build(leaves)
        return tokens, self._cut(begin_step(ends, self._config.text, self._form, tokens.ids, step, PAGE_SIZE))

    def _run_attention(
        self,
        part: Part[AttentionBlock],
        leaves: Leaves,
        hidden: Float[Array, "B T D"],
        returned: Pieces,
        context: AttentionContext,
        pages: Cache,
        numbers: Int[Array, " 2"],
    ) -> tuple[Float[Array, "B T D"], Pieces, Cache]:
        self.num_traces["attention"] += 1
        tokens = self._join(hidden, returned, context)
        layer_pages = count_pages(pages, self.num_layers)
        block = part.build(leaves, numbers[1])
        residual, rows, pages = attention_step(block, self._form, tokens, pages, numbers[0], layer_pages)
        return residual, self._pieces(rows), pages

    def _run_ffn(self, part: Part[FfnBlock], leaves: Leaves, pieces: Pieces, numbers: Int[Array, " 2"]) -> Pieces:
        self.num_traces["ffn"] += 1
        block, num_experts = part.build(leaves, numbers[1]), self._config.text.moe_num_experts
        rows = jnp.concatenate(pieces)
        out = ffn_step(block, self._topology.ffn, num_experts, self._form, rows, self._ffn_dtype)
        return tuple(jnp.split(out, self._ffn_pieces))

    def _run_end(
        self,
        leaves: Leaves,
        hidden: Float[Array, "B T D"],
        returned: Pieces,
        context: AttentionContext,
        tokens: StepTokens,
        batch: DecodeBatch,
        sampling: SamplingBatch,
        rows: RowState,
    ) -> tuple[RowState, Int[Array, "1 3"]]:
        self.num_traces["end"] += 1
        ends = self._ends.skeleton.build(leaves)
        logits = end_step(ends, self._form, self._join(hidden, returned, context))
        rows = verify_tokens(rows, logits, tokens, batch, sampling)
        leaving = [leaving_rows(rows, batch, leave_early) for leave_early in (False, True)]
        return rows, jnp.stack([jnp.sum(each) for each in (rows.report.finish == RUNNING, *leaving)])[None]

    def _run_encode(self, leaves: Leaves, pixels: Float[Array, "images 3 S S"]) -> Float[Array, "images tokens D"]:
        self.num_traces["encode_images"] += 1
        return self._vision.encode(leaves, pixels)

    def _run_copy(self, cache: Cache, sources: Int[Array, " copies"], targets: Int[Array, " copies"]) -> Cache:
        self.num_traces["copy_pages"] += 1
        return copy_pages(cache, sources, targets, self.num_layers)

    def _cut(self, tokens: Tokens) -> Flow:
        return Flow(tokens.hidden, self._pieces(tokens.returned), tokens.context)

    def _pieces(self, rows: Array) -> Pieces:
        """A device's rows as equal pieces; the last one is padded with zeros."""
        padded = jnp.pad(rows, ((0, -rows.shape[0] % self._attention_pieces), (0, 0)))
        return tuple(jnp.split(padded, self._attention_pieces))

    def _join(self, hidden: Float[Array, "B T D"], returned: Pieces, context: AttentionContext) -> Tokens:
        num_tokens = hidden.shape[0] * hidden.shape[1]
        return Tokens(hidden, jnp.concatenate(returned)[:num_tokens], context)


def _jit_for(platform: str) -> Callable[..., jax.stages.Wrapped]:
    """`jax.jit` with the options of a side's platform."""
    return functools.partial(jax.jit, compiler_options=compiler_options(platform))


def _list_halves(
    parts: Sequence[Part[M]], jit: Callable[[Part[M]], jax.stages.Wrapped], layout: Layout
) -> list[LayerHalf]:
    """The halves of all layers."""
    jits: dict[tuple[int, bool], jax.stages.Wrapped] = {}
    halves: list[LayerHalf] = []
    for part in parts:
        kind = id(part.skeleton), part.stacked_layers is None
        call = jits[kind] = jits.get(kind) or jit(part)
        for index in range(part.num_layers):
            # Placed here once: a number on the host would be copied to the devices in each call.
            numbers = jax.device_put(np.array([len(halves), index], np.int32), layout.sharding())
            halves.append(LayerHalf(part.leaves, call, numbers))
    return halves


def _spec(leaf: Array) -> PartitionSpec:
    """How a weight is sharded."""
    sharding = leaf.sharding
    if not isinstance(sharding, NamedSharding):
        raise ValueError(
            f"a weight of shape {leaf.shape} is on {sharding}, not on the devices of a topology: place the model"
        )
    return sharding.spec
