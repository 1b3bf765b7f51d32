"""The jitted calls on one device: images, chunks of prompts, and the decode loop."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.storage import Storage
from step3_jax.cache.paged import Cache, copy_pages, count_pages, empty_cache
from step3_jax.config import TextConfig
from step3_jax.cpu_kernels.api import filled_rows
from step3_jax.engine.decode_loop import decode_loop
from step3_jax.engine.executor import Executor, Started, num_copies
from step3_jax.engine.state import DecodeBatch, DecodeCall, ExpertTokens, PrefillBatch, Report
from step3_jax.layers.attention import CacheStep
from step3_jax.layers.embed import merge_image_features
from step3_jax.layers.router import Routing, count_tokens
from step3_jax.model.cpu import find_model_kernels, prepare_for_cpu
from step3_jax.model.step3 import Step3
from step3_jax.sampling.batch import SamplingBatch
from step3_jax.sampling.speculation import Speculation

Weights = list[Array]


class Runner(Executor):
    """Runs a `Step3` module on the default device.

    The module is split once. Programs are keyed only by shapes: the cache's, and for decode
    the sequences, the width of the table and the most steps; for prefill the tokens of the chunk and its rows of image
    features.
    """

    def __init__(self, model: Step3) -> None:
        """Takes a model. How it runs on a CPU is in `model.cpu`."""
        super().__init__(model.config, jax.local_devices()[:1], model.text.dtype, num_shards=1)
        if self.is_cpu:
            model = prepare_for_cpu(model, find_model_kernels(model.text.dtype))
        self._split = SplitModel(model)
        self._traced = TracedCalls(self._split.build, self.num_traces, self.config.text)
        self._prefill = self._jit(self._traced.prefill, donate_argnames=("cache",))
        self._decode = self._jit(
            self._traced.decode, static_argnames=("max_steps", "speculation"), donate_argnames=("cache",)
        )
        self._encode = self._jit(self._traced.encode)
        self._copy = self._jit(self._traced.copy_pages, donate_argnames=("cache",))

    def allocate_cache(self, num_pages: int, storage: Storage) -> Cache:
        """See `Executor.allocate_cache`."""
        return empty_cache(self.config.text, num_pages, storage, as_bits=self.is_cpu)

    def _encode_images(self, pixels: Float[np.ndarray, "images 3 S S"]) -> Float[Array, "images tokens D"]:
        return self._timed("encode_images", self._encode, self._split.weights, pixels)

    def prefill(self, cache: Cache, batch: PrefillBatch) -> tuple[Cache, Started[ExpertTokens]]:
        """See `Executor.prefill`."""
        cache, counts = self._timed("prefill", self._prefill, self._split.weights, cache, batch)
        return cache, Started(counts)

    def decode(self, cache: Cache, call: DecodeCall) -> tuple[Cache, Started[Report]]:
        """See `Executor.decode`."""
        given = self._place_call(call)
        cache, report = self._timed(
            "decode",
            self._decode,
            self._split.weights,
            cache,
            *given,
            max_steps=call.max_steps,
            speculation=call.speculation,
        )
        return cache, Started(call.cut_report(report))

    def lower(self, cache: Cache, call: PrefillBatch | DecodeCall) -> jax.stages.Lowered:
        """See `Executor.lower`."""
        if isinstance(call, PrefillBatch):
            return self._timed("prefill", self._prefill.lower, self._split.weights, cache, call)
        given = self._place_call(call)
        return self._timed(
            "decode",
            self._decode.lower,
            self._split.weights,
            cache,
            *given,
            max_steps=call.max_steps,
            speculation=call.speculation,
        )

    def copy_pages(self, cache: Cache, sources: Sequence[int], targets: Sequence[int]) -> Cache:
        """See `Executor.copy_pages`."""
        missing = num_copies(sources) - len(sources)
        num_pages = count_pages(cache, self.config.text.num_hidden_layers)
        return self._timed(
            "copy_pages",
            self._copy,
            cache,
            np.asarray([*sources, *[num_pages] * missing], np.int32),
            np.asarray([*targets, *[num_pages] * missing], np.int32),
        )

    def prefill_program(self, cache: Cache, batch: PrefillBatch) -> jax.stages.Compiled:
        """The compiled chunk of a bucket, for reading; the arguments may be abstract, and are not consumed."""
        return self._prefill.lower(self._split.weights, cache, batch).compile()

    def decode_program(
        self,
        cache: Cache,
        batch: DecodeBatch,
        sampling: SamplingBatch,
        *,
        max_steps: int,
        speculation: Speculation | None = None,
    ) -> jax.stages.Compiled:
        """The compiled decode loop of a bucket, for reading; the arguments may be abstract, and are not consumed."""
        given = batch, sampling, np.int32(1), np.bool_(False)
        lowered = self._decode.lower(self._split.weights, cache, *given, max_steps=max_steps, speculation=speculation)
        return lowered.compile()


class SplitModel:
    """A module as bare leaves, which cross the jit boundary, and the function that makes a module of them again.

    Attributes:
      weights: The leaves. Flattening `nnx.State` in Python at every call would cost more than the dispatch.
    """

    def __init__(self, model: Step3) -> None:
        self._graphdef, state = nnx.split(model)
        self.weights: Weights
        self.weights, self._treedef = jax.tree.flatten(state)

    def build(self, weights: Weights) -> Step3:
        """The module with these leaves."""
        return nnx.merge(self._graphdef, jax.tree.unflatten(self._treedef, weights))


class TracedCalls:
    """The functions that executors of whole models compile; each counts its traces by a Python side effect."""

    def __init__(
        self,
        build: Callable[[Weights], Step3],
        num_traces: collections.Counter[str],
        config: TextConfig,
        any_row: Callable[[Bool[Array, " B"]], Bool[Array, ""]] = jnp.any,
    ) -> None:
        """Takes the function that builds the module.

        Args:
          build: See `SplitModel.build`.
          num_traces: Counts the traces by name.
          config: The decoder's sizes.
          any_row: See `decode_loop`.
        """
        self._build = build
        self._num_traces = num_traces
        self._config = config
        self._any_row = any_row

    def encode(self, weights: Weights, pixels: Float[Array, "images 3 S S"]) -> Float[Array, "images tokens D"]:
        """Features of images."""
        self._num_traces["encode_images"] += 1
        return self._build(weights).encode_images(pixels)

    def copy_pages(self, cache: Cache, sources: Int[Array, " copies"], targets: Int[Array, " copies"]) -> Cache:
        """The cache with the pages copied."""
        self._num_traces["copy_pages"] += 1
        return copy_pages(cache, sources, targets, self._config.num_hidden_layers)

    def prefill(self, weights: Weights, cache: Cache, batch: PrefillBatch) -> tuple[Cache, Int[Array, "1 layers E"]]:
        """The cache with a chunk's tokens, and how many of them each expert got."""
        self._num_traces["prefill"] += 1
        decoder = self._build(weights).text
        embeddings = decoder.embed(batch.token_ids[None])
        if batch.features is not None and batch.feature_rows is not None:
            embeddings = merge_image_features(embeddings, batch.features, batch.feature_rows[None])
        step = CacheStep(batch.table, batch.lengths, batch.query_starts)
        num_experts = self._config.moe_num_experts

        def count(routing: Routing) -> Int[Array, " E"]:
            return count_tokens(routing, batch.query_starts[-1], num_experts)

        with filled_rows(step.count_filled(batch.token_ids.shape[0]), batch.token_ids.shape[0]):
            _, filled, counts = decoder.run(embeddings, cache=cache, step=step, observe=count)
        if self._config.is_moe_layer(self._config.num_hidden_layers - 1):
            # The hidden states are unused, so the parts of the last layer that only they need are not computed; nor is its
            # routing.
            counts[-1] = counts[-1][:-1]
        joined = jnp.concatenate(counts) if counts else jnp.zeros((0, num_experts), jnp.int32)
        return cache if filled is None else filled, joined[None]

    def decode(
        self,
        weights: Weights,
        cache: Cache,
        batch: DecodeBatch,
        sampling: SamplingBatch,
        num_steps: Int[Array, ""],
        leave_early: Bool[Array, ""],
        *,
        max_steps: int,
        speculation: Speculation | None = None,
    ) -> tuple[Cache, Report]:
        """The decode loop."""
        self._num_traces["decode"] += 1
        decoder = self._build(weights).text

        def forward(ids: Int[Array, "B T"], cache: Cache, step: CacheStep) -> tuple[Float[Array, "B T V"], Cache]:
            with filled_rows(step.count_filled(ids.shape[1]), ids.size):
                hidden, filled = decoder(decoder.embed(ids), cache=cache, step=step)
                return decoder.logits(hidden), cache if filled is None else filled

        return decode_loop(
            forward,
            cache,
            batch,
            sampling,
            num_steps,
            leave_early,
            vocab_size=self._config.vocab_size,
            max_steps=max_steps,
            speculation=speculation,
            any_row=self._any_row,
        )
