"""The jitted calls on one device: images, prefill, and the decode loop."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from step3_jax.cache.contiguous import empty_cache, extend_cache
from step3_jax.engine.state import Cache, DecodeState, PrefillBatch, Report, decode_loop, start_state
from step3_jax.layers.embed import merge_image_features
from step3_jax.layers.moe import separate_experts
from step3_jax.model.step3 import Step3
from step3_jax.sampling.batch import SamplingBatch, SamplingMode

P = ParamSpec("P")
R = TypeVar("R")


class Runner:
    """Runs a `Step3` module; an `executor.Executor`.

    The module is split once. What is compiled is keyed by shapes (batch, prompt bucket, cache length, feature rows) and,
    but for prefill, by the sampling mode, and by nothing else.

    Attributes:
      config: The model's sizes.
      compile_s: Seconds spent in calls that had to trace, up to their dispatch.
      num_traces: How often each call was traced, by name.
    """

    def __init__(self, model: Step3) -> None:
        """Takes a model, whose dtype is also the cache's.

        On a CPU a bfloat16 model is held and run in float32, which XLA:CPU decodes one sequence with faster, though it
        reads twice the bytes (see benchmarks/README.md).
        """
        self.config = model.config
        self.compile_s = 0.0
        self.num_traces: collections.Counter[str] = collections.Counter()
        if jax.default_backend() == "cpu":
            # A module of its own, so that the caller's stays whole; weights that need no cast are shared.
            graphdef, state = nnx.split(model)
            model = nnx.merge(graphdef, jax.tree.map(_widen, state))
            separate_experts(model)
        self._dtype = model.text.embed_tokens.weight.get_value().dtype
        self._graphdef, state = nnx.split(model)
        # Bare leaves: flattening nnx.State in Python at every call would cost more than the dispatch.
        self._weights, self._treedef = jax.tree.flatten(state)
        self._prefill = jax.jit(self._run_prefill, static_argnames=("cache_length",))
        self._start = jax.jit(self._run_start, static_argnames=("length", "mode"))
        self._decode = jax.jit(self._run_decode, static_argnames=("mode",), donate_argnames=("state",))
        self._encode = jax.jit(self._run_encode)

    def encode_images(self, pixels: Float[np.ndarray, "images 3 S S"]) -> Float[Array, "images tokens D"]:
        """See `Executor.encode_images`."""
        return self._timed("encode_images", self._encode, self._weights, pixels)

    def prefill(
        self, batch: PrefillBatch, sampling: SamplingBatch, *, cache_length: int, mode: SamplingMode
    ) -> tuple[DecodeState, Report]:
        """See `Executor.prefill`."""
        cache, logits = self._timed("prefill", self._prefill, self._weights, batch, cache_length=cache_length)
        state, report = self._timed("start", self._start, logits, batch, sampling, length=cache_length, mode=mode)
        return state._replace(cache=cache), report

    def decode(
        self,
        state: DecodeState,
        sampling: SamplingBatch,
        is_halted: Bool[np.ndarray, " B"],
        num_steps: int,
        *,
        mode: SamplingMode,
    ) -> tuple[DecodeState, Report]:
        """See `Executor.decode`."""
        steps = np.int32(num_steps)
        return self._timed("decode", self._decode, self._weights, state, sampling, is_halted, steps, mode=mode)

    def decode_program(self, state: DecodeState, sampling: SamplingBatch, *, mode: SamplingMode) -> jax.stages.Compiled:
        """The compiled decode loop of a bucket, for reading; `state` may be abstract and is not consumed."""
        is_halted, steps = np.zeros(state.last.shape, bool), np.int32(1)
        return self._decode.lower(self._weights, state, sampling, is_halted, steps, mode=mode).compile()

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

    def _run_prefill(
        self, weights: list[Array], batch: PrefillBatch, *, cache_length: int
    ) -> tuple[Cache, Float[Array, "B V"]]:
        self.num_traces["prefill"] += 1
        decoder = self._model(weights).text
        batch_size, length = batch.token_ids.shape
        embeddings = decoder.embed_tokens(batch.token_ids)
        if batch.features is not None and batch.feature_rows is not None:
            embeddings = merge_image_features(embeddings, batch.features, batch.feature_rows)
        # Prompts attend to their own bucket alone; the room for the output is added behind.
        cache = empty_cache(self.config.text, batch_size, length, self._dtype)
        hidden, filled = decoder(embeddings, cache=cache)
        # Of all the prompt only the last token's logits are needed.
        last = jnp.take_along_axis(hidden, (batch.lengths - 1)[:, None, None], axis=1)[:, 0]
        return extend_cache(filled or cache, cache_length), decoder.logits(last)

    def _run_start(
        self,
        logits: Float[Array, "B V"],
        batch: PrefillBatch,
        sampling: SamplingBatch,
        *,
        length: int,
        mode: SamplingMode,
    ) -> tuple[DecodeState, Report]:
        self.num_traces["start"] += 1
        state = start_state(logits, batch, sampling, length=length, mode=mode)
        # An output of its own: the state's is given away at the next call.
        return state, state.report

    def _run_decode(
        self,
        weights: list[Array],
        state: DecodeState,
        sampling: SamplingBatch,
        is_halted: Bool[Array, " B"],
        num_steps: Int[Array, ""],
        *,
        mode: SamplingMode,
    ) -> tuple[DecodeState, Report]:
        self.num_traces["decode"] += 1
        decoder = self._model(weights).text

        def forward(
            last: Int[Array, " B"], cache: Cache, cached: Int[Array, " B"]
        ) -> tuple[Float[Array, "B V"], Cache]:
            hidden, filled = decoder(decoder.embed_tokens(last[:, None]), cache=cache, starts=cached)
            return decoder.logits(hidden[:, 0]), filled or cache

        state = decode_loop(forward, state, sampling, is_halted, num_steps, mode=mode)
        return state, state.report


def _widen(weight: Array) -> Array:
    return weight.astype(jnp.float32) if weight.dtype == jnp.bfloat16 else weight
