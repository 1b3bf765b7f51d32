"""The jitted calls on one device: images, chunks of prompts, and the decode loop."""

from __future__ import annotations

import collections
import functools
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.pages import Storage
from step3_jax.cache.paged import Cache, empty_cache
from step3_jax.engine.state import DecodeBatch, DecodeCall, PrefillBatch, Report, decode_loop
from step3_jax.gpu import compiler_options, memory_left
from step3_jax.layers.attention import CacheStep
from step3_jax.layers.embed import merge_image_features
from step3_jax.layers.moe import separate_experts
from step3_jax.model.step3 import Step3
from step3_jax.sampling.batch import SamplingBatch, SamplingMode

P = ParamSpec("P")
R = TypeVar("R")


class Runner:
    """Runs a `Step3` module; an `executor.Executor`.

    The module is split once. What is compiled is keyed by shapes and, for decode, by the sampling mode, and by nothing
    else. The shapes are those of the cache, and: for decode the rows, the width of the table and the most steps; for
    prefill the tokens of the chunk and its rows of image features.

    Attributes:
      config: The model's sizes.
      dtype: Of activations.
      num_shards: See `Executor`.
      compile_s: Seconds spent in calls that had to trace, up to their dispatch.
      num_traces: How often each call was traced, by name.
    """

    num_shards = 1

    def __init__(self, model: Step3) -> None:
        """Takes a model.

        On a CPU a bfloat16 model is held and run in float32, which XLA:CPU decodes one sequence with faster, though it
        reads twice the bytes (see benchmarks/README.md).
        """
        self._set_up(model)
        if jax.default_backend() == "cpu":
            model = widen_weights(model)
            separate_experts(model)
        self.dtype = model.text.embed_tokens.weight.get_value().dtype
        self._split(model)
        jit = functools.partial(jax.jit, compiler_options=compiler_options(jax.default_backend()))
        self._prefill = jit(self._run_prefill, donate_argnames=("cache",))
        self._decode = jit(self._run_decode, static_argnames=("max_steps", "mode"), donate_argnames=("cache",))
        self._encode = jit(self._run_encode)

    def _set_up(self, model: Step3) -> None:
        self.config = model.config
        self.compile_s = 0.0
        self.num_traces: collections.Counter[str] = collections.Counter()

    def _split(self, model: Step3) -> None:
        self._graphdef, state = nnx.split(model)
        # Bare leaves: flattening nnx.State in Python at every call would cost more than the dispatch.
        self._weights, self._treedef = jax.tree.flatten(state)

    def cache_memory_bytes(self) -> int | None:
        """See `Executor.cache_memory_bytes`."""
        return memory_left(jax.local_devices()[:1])

    def allocate_cache(self, num_pages: int, storage: Storage) -> Cache:
        """See `Executor.allocate_cache`."""
        return empty_cache(self.config.text, num_pages, storage, as_bits=jax.default_backend() == "cpu")

    def encode_images(self, pixels: Float[np.ndarray, "images 3 S S"]) -> Float[Array, "images tokens D"]:
        """See `Executor.encode_images`."""
        return self._timed("encode_images", self._encode, self._weights, pixels)

    def prefill(self, cache: Cache, batch: PrefillBatch) -> Cache:
        """See `Executor.prefill`."""
        return self._timed("prefill", self._prefill, self._weights, cache, batch)

    def decode(self, cache: Cache, call: DecodeCall) -> tuple[Cache, Report]:
        """See `Executor.decode`."""
        given = call.batch, call.sampling, np.int32(call.num_steps), np.bool_(call.leave_early)
        return self._timed(
            "decode", self._decode, self._weights, cache, *given, max_steps=call.max_steps, mode=call.mode
        )

    def prefill_program(self, cache: Cache, batch: PrefillBatch) -> jax.stages.Compiled:
        """The compiled chunk of a bucket, for reading; the arguments may be abstract, and are not consumed."""
        return self._prefill.lower(self._weights, cache, batch).compile()

    def decode_program(
        self, cache: Cache, batch: DecodeBatch, sampling: SamplingBatch, *, max_steps: int, mode: SamplingMode
    ) -> jax.stages.Compiled:
        """The compiled decode loop of a bucket, for reading; the arguments may be abstract, and are not consumed."""
        given = np.int32(1), np.bool_(False)
        return self._decode.lower(
            self._weights, cache, batch, sampling, *given, max_steps=max_steps, mode=mode
        ).compile()

    def _timed(self, name: str, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        num_traces, start = self.num_traces[name], time.perf_counter()
        result = call(*args, **kwargs)
        if self.num_traces[name] != num_traces:
            self.compile_s += time.perf_counter() - start
        return result

    def _model(self, weights: list[Array]) -> Step3:
        return nnx.merge(self._graphdef, jax.tree.unflatten(self._treedef, weights))

    # The functions below are traced; each counts its traces by a side effect of Python.

    def _run_encode(
        self, weights: list[Array], pixels: Float[Array, "images 3 S S"]
    ) -> Float[Array, "images tokens D"]:
        self.num_traces["encode_images"] += 1
        return self._model(weights).encode_images(pixels)

    def _run_prefill(self, weights: list[Array], cache: Cache, batch: PrefillBatch) -> Cache:
        self.num_traces["prefill"] += 1
        decoder = self._model(weights).text
        embeddings = decoder.embed_tokens(batch.token_ids[None])
        if batch.features is not None and batch.feature_rows is not None:
            embeddings = merge_image_features(embeddings, batch.features, batch.feature_rows[None])
        step = CacheStep(batch.table, batch.lengths, batch.query_starts)
        # The hidden states have no reader, so what only they need of the last layer is not computed.
        _, filled = decoder(embeddings, cache=cache, step=step)
        return filled or cache

    def _run_decode(
        self,
        weights: list[Array],
        cache: Cache,
        batch: DecodeBatch,
        sampling: SamplingBatch,
        num_steps: Int[Array, ""],
        leave_early: Bool[Array, ""],
        *,
        max_steps: int,
        mode: SamplingMode,
    ) -> tuple[Cache, Report]:
        self.num_traces["decode"] += 1
        decoder = self._model(weights).text

        def forward(last: Int[Array, " B"], cache: Cache, step: CacheStep) -> tuple[Float[Array, "B V"], Cache]:
            hidden, filled = decoder(decoder.embed_tokens(last[:, None]), cache=cache, step=step)
            return decoder.logits(hidden[:, 0]), filled or cache

        return decode_loop(
            forward,
            cache,
            batch,
            sampling,
            num_steps,
            leave_early,
            vocab_size=self.config.text.vocab_size,
            max_steps=max_steps,
            mode=mode,
            any_row=self._any_row,
        )

    def _any_row(self, holds: Bool[Array, " B"]) -> Bool[Array, ""]:
        return jnp.any(holds)


def widen_weights(model: Step3) -> Step3:
    """A module of its own with bfloat16 weights in float32, so that `model` stays whole; the others are shared."""
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(_widen, state))


def _widen(weight: Array) -> Array:
    return weight.astype(jnp.float32) if weight.dtype == jnp.bfloat16 else weight
