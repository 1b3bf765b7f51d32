"""A process of the FFN side in executor `program`."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.storage import Storage
from step3_jax.afd.program.call import Numbers
from step3_jax.afd.program.ffn_loop import FfnLoop, FfnWeights
from step3_jax.afd.program.process import COPY, OWN, RoleProcess, encode, take_vision
from step3_jax.afd.program.wire import Slots
from step3_jax.afd.roles import take_apart
from step3_jax.afd.topology import AfdTopology
from step3_jax.cache.paged import Cache
from step3_jax.distributed import agree_least
from step3_jax.engine.executor import Started
from step3_jax.engine.state import DecodeBatch, DecodeCall, PrefillBatch, Report
from step3_jax.model.step3 import Step3
from step3_jax.sampling.batch import SamplingBatch

# What a process that holds no cache says of the memory that is left for it.
_NO_LIMIT_BYTES = 2**50


class FfnProcess(RoleProcess):
    """A process of the FFN side: it holds no cache, reads of a batch nothing but its size, and gets the whole report.

    Attributes:
      weights: Those that this process holds, as arrays over all devices.
      loop: What a call does on each device.
    """

    def __init__(self, model: Step3, topology: AfdTopology, *, num_microbatches: int, payload: str) -> None:
        """As for `make_program_executor`."""
        super().__init__(model, topology, payload)
        parts = take_apart(model)
        self.loop = FfnLoop(parts, self.config.text, topology, self.form, num_microbatches, self.dtype, self._observe)
        self.weights: FfnWeights = [self._take(part.leaves) for part in parts.ffn]
        self._vision = take_vision(model)
        own, copies = self._own, self._copies
        self._prefill = self._jit(self._run_prefill, static_argnums=1, in_shardings=(own,), out_shardings=copies)
        self._decode = self._jit(
            self._run_decode, static_argnums=(2, 3), in_shardings=(own, copies), out_shardings=copies
        )

    def cache_memory_bytes(self, rows: int, chunk_tokens: int) -> int | None:
        """See `Executor.cache_memory_bytes`: what the attention side has left."""
        stats = self.topology.union.local_devices[0].memory_stats()
        return agree_least(_NO_LIMIT_BYTES) if stats and "bytes_limit" in stats else None

    def allocate_cache(self, num_pages: int, storage: Storage) -> Cache:
        """See `Executor.allocate_cache`: nothing."""
        return ()

    def encode_images(self, pixels: Float[np.ndarray, "images 3 S S"]) -> Float[np.ndarray, "images tokens D"]:
        """See `Executor.encode_images`: zeros, as the attention side alone needs the features.

        Raises:
          ValueError: If the model has no vision tower.
        """
        leaves = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in self._vision.leaves] if self._vision else []
        shape = jax.eval_shape(functools.partial(encode, self._vision), leaves, pixels)
        return np.zeros(shape.shape, shape.dtype)

    def _encode_images(self, pixels: Float[np.ndarray, "images 3 S S"]) -> Float[Array, "images tokens D"]:
        raise NotImplementedError("the FFN side has no use for image features")

    def prefill(self, cache: Cache, batch: PrefillBatch) -> tuple[Cache, Started[object]]:
        """See `Executor.prefill`."""
        self._call("prefill", self._prefill, self.weights, batch.token_ids.shape[0] // self.num_shards)
        return cache, Started(None)

    def decode(self, cache: Cache, call: DecodeCall) -> tuple[Cache, Started[Report]]:
        """See `Executor.decode`."""
        num_rows, numbers = call.batch.last.shape[0] // self.num_shards, self._numbers(call.num_steps, call.leave_early)
        report, taken = self._call("decode", self._decode, self.weights, numbers, num_rows, call.max_steps)
        self._num_steps += int(taken)
        return cache, Started(call.cut_report(report))

    def copy_pages(self, cache: Cache, sources: Sequence[int], targets: Sequence[int]) -> Cache:
        """See `Executor.copy_pages`: nothing."""
        return cache

    def decode_program(
        self, cache: Cache, batch: DecodeBatch, sampling: SamplingBatch, *, max_steps: int
    ) -> jax.stages.Compiled:
        """See `AttentionProcess.decode_program`."""
        num_rows, numbers = batch.last.shape[0] // self.num_shards, self._numbers(1, False)
        return self._decode.lower(self.weights, numbers, num_rows, max_steps).compile()

    def _run_prefill(self, weights: FfnWeights, num_tokens: int) -> Slots:
        self.num_traces["prefill"] += 1
        return self._on_union(functools.partial(self.loop.prefill, num_tokens=num_tokens), (OWN,), COPY)(weights)

    def _run_decode(
        self, weights: FfnWeights, numbers: Numbers, num_rows: int, max_steps: int
    ) -> tuple[Report, Int[Array, ""]]:
        self.num_traces["decode"] += 1
        run = functools.partial(self.loop.decode, num_rows=num_rows, max_steps=max_steps)
        return self._on_union(run, (OWN, COPY), COPY)(weights, numbers)
