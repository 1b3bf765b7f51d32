"""Executor `host`: one process, two meshes, a jitted call for each stage, micro-batches in flight.

The host only hands out work: calls return before they have run. For each layer it hands out every micro-batch's
attention step, exchange, FFN step and exchange back. Each role's devices take their calls in the order they come in, so
that the FFN side works on one micro-batch while the attention side works on the next.
"""

from __future__ import annotations

import collections
import functools
import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from pallas_kernels.storage import Storage
from step3_jax.afd.host.calls import Flow, RoleCalls
from step3_jax.afd.host.exchange import Exchange
from step3_jax.afd.host.flight import Flight
from step3_jax.afd.payload import PayloadFormat
from step3_jax.afd.placement import load_placed_model
from step3_jax.afd.topology import AfdTopology
from step3_jax.cache.paged import Cache, count_pages, empty_cache
from step3_jax.engine.executor import Executor, Started, local_pages, num_copies
from step3_jax.engine.state import DecodeCall, ExpertTokens, PrefillBatch, Report
from step3_jax.layout.deployment import DEFAULT_DEADLINE_S, DEFAULT_MICROBATCHES, check_microbatches
from step3_jax.layout.payload import choose_payload
from step3_jax.layout.role import Role
from step3_jax.model.cpu import copy_module, find_model_kernels, use_kernels, widen
from step3_jax.model.layers import LayerStack
from step3_jax.model.step3 import Step3
from step3_jax.timeline.event import Event, Lane, Stage

# Stages of each micro-batch that may be in flight: those of a layer that runs, and of one that waits for its turn.
_STAGES_AHEAD = 8


class HostExecutor(Executor):
    """Runs a model with attention and FFN on disjoint devices of this process; `num_shards` are the attention devices.

    Attributes:
      topology: The devices.
      form: What crosses between the roles.
      calls: The jitted calls, with their counts.
    """

    def __init__(
        self,
        model: Step3,
        topology: AfdTopology,
        *,
        num_microbatches: int = DEFAULT_MICROBATCHES,
        payload: str = "auto",
        deadline_s: float = DEFAULT_DEADLINE_S,
    ) -> None:
        """Takes a model whose weights are placed as `topology.parameter` says (`load_host_executor`, `place_model`).

        Args:
          model: The model.
          topology: The devices.
          num_microbatches: Micro-batches in flight, 1 to 4.
          payload: What crosses from attention to FFN: "fp8", "bfloat16", "float32", or "auto", which is float32 (exact)
            for float32 activations and fp8 for others.
          deadline_s: How long a stage may take once those before it have ended.

        Raises:
          ValueError: If a value is not allowed, or the FFN side cannot hold the model in shards.
        """
        check_microbatches(num_microbatches)
        topology.check(model.config)
        super().__init__(
            model.config,
            list(topology.attention.mesh.devices.flat),
            model.text.dtype,
            num_shards=topology.num_attention,
            num_image_shards=topology.tower.size("images"),
        )
        model = _prepare_sides(model, topology)
        self.topology = topology
        self.form = PayloadFormat.of(self.config.text, choose_payload(payload, self.dtype.name))
        self.calls = RoleCalls(model, topology, self.form, num_microbatches)
        self.num_traces = self.calls.num_traces
        self._exchange = Exchange(topology)
        self._flight = Flight(deadline_s)
        self._num_started: collections.Counter[str] = collections.Counter()

    @property
    def role(self) -> Role:
        """See `Executor.role`."""
        return self.topology.attention_role

    @property
    def num_microbatches(self) -> int:
        """See `Executor.num_microbatches`."""
        return self.calls.num_microbatches

    @property
    def afd_wait_s(self) -> float:
        """See `Executor.afd_wait_s`."""
        return self._flight.ffn_wait_s

    @property
    def _everywhere(self) -> NamedSharding:
        return self.topology.attention.sharding()

    def allocate_cache(self, num_pages: int, storage: Storage) -> Cache:
        """See `Executor.allocate_cache`; the pages are on the attention devices alone."""
        make = functools.partial(empty_cache, self.config.text, num_pages, storage, as_bits=self.is_cpu)
        return jax.jit(make, out_shardings=self.topology.attention.sharding("rows"))()

    def copy_pages(self, cache: Cache, sources: Sequence[int], targets: Sequence[int]) -> Cache:
        """See `Executor.copy_pages`."""
        shard_pages, size = self._pages_of_shard(cache), num_copies(sources)
        own = (local_pages(pages, shard_pages, self.num_shards, size) for pages in (sources, targets))
        cache = self.calls.copy_pages(cache, *own)
        self.compile_s = self.calls.compile_s
        return cache

    def _encode_images(self, pixels: Float[np.ndarray, "images 3 S S"]) -> Float[Array, "images tokens D"]:
        features = self.calls.encode_images(pixels)
        self.compile_s = self.calls.compile_s
        return features

    def prefill(self, cache: Cache, batch: PrefillBatch) -> tuple[Cache, Started[ExpertTokens]]:
        """See `Executor.prefill`.

        Raises:
          TimeoutError: If a stage does not end by its deadline; the message names it.
        """
        calls = self.calls
        flows = calls.begin_chunk(batch, self._pages_of_shard(cache))
        number = self._count("prefill")
        for layer in range(calls.num_layers):
            # Only the cache of the last layer is used.
            needs_ffn = layer < calls.num_layers - 1
            flows, cache = self._run_layer(flows, cache, layer, "prefill", number, needs_ffn=needs_ffn)
        self._flight.drain()
        self.compile_s = calls.compile_s
        return cache, Started(None)

    def decode(self, cache: Cache, call: DecodeCall) -> tuple[Cache, Started[Report]]:
        """See `Executor.decode`.

        Whether rows have ended is read one step late, so that no step waits for the answer of the one before: a call may
        take a step more than it needs, in which rows that have ended do nothing. So a row has as many tokens in each step
        too, whether there are guesses or not.

        Raises:
          TimeoutError: If a stage does not end by its deadline; the message names it.
        """
        calls = self.calls
        parts = calls.split(
            self._place_wide(call),
            call.sampling,
            self._pages_of_shard(cache),
            max_steps=call.max_steps,
            speculation=call.speculation,
        )
        counts: collections.deque[list[Int[Array, "S 3"]]] = collections.deque()
        for _ in range(call.num_steps):
            if len(counts) == 2 and self._is_over(counts.popleft(), call.leave_early):
                break
            number = self._count("decode")
            begun = [calls.begin(part, call.speculation) for part in parts]
            flows = [flow for _, flow in begun]
            for layer in range(calls.num_layers):
                flows, cache = self._run_layer(flows, cache, layer, "decode", number)
            counts.append([])
            for index, (part, (tokens, _), flow) in enumerate(zip(parts, begun, flows, strict=True)):
                last = Stage("to_attention", "decode", number, calls.num_layers - 1, index)
                rows, count = calls.end(part, tokens, self._bring_back(flow, last, len(parts)))
                parts[index] = part._replace(rows=rows)
                counts[-1].append(count)
                self._note(Stage("attention", "decode", number, calls.num_layers, index), count, len(parts))
        report = calls.merge([part.rows.report for part in parts], call.batch.last.shape[0] // self.num_shards)
        self._flight.drain()
        self.compile_s = calls.compile_s
        return cache, Started(call.cut_report(report))

    def start_recording(self) -> None:
        """Starts recording which device runs which stage when; see `timeline.trace`."""
        self._flight.start_recording()

    def stop_recording(self) -> list[Event]:
        """Ends a recording; returns its events, sorted by end time."""
        return self._flight.stop_recording()

    def _run_layer(
        self,
        flows: Sequence[Flow],
        pages: Cache,
        layer: int,
        phase: str,
        number: int,
        *,
        needs_ffn: bool = True,
    ) -> tuple[list[Flow], Cache]:
        """Dispatches one layer for all micro-batches; returns the cache with their new rows.

        What the FFN side computes stays there until the micro-batch's next attention half, so that where the host waits
        for copies (see `_wait_to_copy`) each side has a micro-batch to work on.
        """
        calls, count, after = self.calls, len(flows), []
        for index, before in enumerate(flows):

            def note(lane: Lane, array: Array, index: int = index) -> Stage:
                stage = Stage(lane, phase, number, layer, index)
                self._note(stage, array, count)
                return stage

            flow = before
            if layer:
                flow = self._bring_back(before, Stage("to_attention", phase, number, layer - 1, index), count)
            hidden, pieces, pages = calls.attend(layer, flow, pages)
            stage = note("attention", pieces[0])
            if needs_ffn:
                self._wait_to_copy(stage, pieces[0])
                arrived = self._exchange.to_ffn(pieces)
                note("to_ffn", arrived[0])
                pieces = calls.feed(layer, arrived)
                note("ffn", pieces[0])
            after.append(Flow(hidden, pieces, flow.context))
        return after, pages

    def _bring_back(self, flow: Flow, stage: Stage, count: int) -> Flow:
        """A micro-batch whose FFN half was dispatched, with its result on the attention side."""
        self._wait_to_copy(stage._replace(lane="ffn"), flow.returned[0])
        pieces = self._exchange.to_attention(flow.returned)
        self._note(stage, pieces[0], count)
        return flow._replace(returned=pieces)

    def _wait_to_copy(self, stage: Stage, array: Array) -> None:
        """Between platforms JAX copies through the host, which blocks: wait here instead, where there is a deadline."""
        if self.topology.is_mixed:
            self._flight.wait_alone(stage, array)

    def _place(self, array: np.ndarray) -> Array:
        return jax.device_put(array, self.topology.attention.sharding("rows"))

    def _note(self, stage: Stage, array: Array, num_microbatches: int) -> None:
        self._flight.push(stage, array, _STAGES_AHEAD * num_microbatches)

    def _is_over(self, counts: Sequence[Int[Array, "S 3"]], leave_early: bool) -> bool:
        for count in counts:
            self._flight.wait_for(count)
        running, *leaving = np.sum([np.asarray(count) for count in counts], axis=(0, 1)).tolist()
        return not running or leaving[leave_early] > 0

    def _pages_of_shard(self, cache: Cache) -> int:
        return count_pages(cache, self.config.text.num_hidden_layers) // self.num_shards

    def _count(self, phase: str) -> int:
        self._num_started[phase] += 1
        return self._num_started[phase] - 1


def _prepare_sides(model: Step3, topology: AfdTopology) -> Step3:
    """A copy of the module, each side of which computes as its own devices do, whatever the default backend is.

    Where a side is one CPU device, its weights are multiplied in their stored format if there are kernels for it.
    """
    own = copy_module(model)
    text = own.text
    is_on_cpu = "cpu" in (topology.devices[0].platform, topology.ffn_platform)
    kernels = find_model_kernels(jnp.float32) if is_on_cpu else None
    layers = [layer.stacked if isinstance(layer, LayerStack) else layer for layer in text.layers]
    has_stacks = any(isinstance(layer, LayerStack) for layer in text.layers)
    attention = [text.embed_tokens, text.norm, text.lm_head, *(layer.attention for layer in layers)]
    attention += [part for part in (own.vision, own.projector) if part is not None]
    sides = (
        (attention, topology.devices[0].platform, topology.num_attention),
        ([layer.ffn for layer in layers], topology.ffn_platform, topology.num_ffn),
    )
    for modules, platform, num_devices in sides:
        for module in modules if platform == "cpu" else ():
            if kernels is not None and num_devices == 1 and not has_stacks:
                use_kernels(module, kernels)
            else:
                widen(module)
    return own


def load_host_executor(
    path: str | os.PathLike[str],
    topology: AfdTopology,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    quantization: str = "auto",
    load_format: str = "auto",
    num_microbatches: int = DEFAULT_MICROBATCHES,
    payload: str = "auto",
    deadline_s: float = DEFAULT_DEADLINE_S,
) -> HostExecutor:
    """Loads a model's folder, each weight straight to the devices of its role; only their parts of it are read.

    Args:
      path: Folder with `config.json` and the weights.
      topology: The devices.
      dtype: "float32" or "bfloat16"; if absent the configuration's. On a CPU it is float32.
      quantization: As for `load_placed_model`, and so is the next.
      load_format: See there.
      num_microbatches: As for `HostExecutor`, like the arguments that follow.
      payload: See there.
      deadline_s: See there.

    Raises:
      ValueError: As `load_placed_model` and `HostExecutor` do; a model that cannot be sharded over the devices is
        refused before anything is loaded.
    """
    check_microbatches(num_microbatches)
    model = load_placed_model(
        path, topology, dtype=dtype, quantization=quantization, load_format=load_format, payload=payload
    )
    return HostExecutor(model, topology, num_microbatches=num_microbatches, payload=payload, deadline_s=deadline_s)
