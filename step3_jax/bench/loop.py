"""The project's own prefill and decode loop, called as an engine would, without an engine."""

from __future__ import annotations

import functools
import time

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from step3_jax.afd.executor import AfdChoice, place_executor
from step3_jax.cache.paged import NO_CACHE, Cache, choose_storage
from step3_jax.engine.bucket_table import power_of_two
from step3_jax.engine.drive.start import drive, take_part
from step3_jax.engine.drive.worker import Worker
from step3_jax.engine.executor import Executor
from step3_jax.engine.runner import Runner
from step3_jax.engine.sharded import ShardedRunner
from step3_jax.engine.state import DecodeBatch, DecodeCall, PrefillBatch
from step3_jax.layout.admission import STEPS_PER_CALL
from step3_jax.layout.page import pages_for
from step3_jax.layout.parallel import Parallel, fit_parallel
from step3_jax.mesh import make_layout
from step3_jax.model.parallel import place_model
from step3_jax.model.step3 import Step3
from step3_jax.sampling.batch import SamplingRow, sampling_batch
from step3_jax.sampling.params import SamplingParams


class Ours:
    """The project's own prefill and decode loop, greedy, on a model in one dtype."""

    def __init__(self, model: Step3, parallel: Parallel | None = None, afd: AfdChoice | None = None) -> None:
        """Takes the model, already in the dtype it runs in, and its devices if there are several.

        In a process above rank 0 it does not return, like `LLM`.
        """
        self._model = model
        load = functools.partial(_make_executor, model, parallel, afd)
        channel = None if parallel is None and afd is None else take_part(load)
        self._runner = drive(load(), channel)
        self._vocab_size = model.config.text.vocab_size
        self._storage = choose_storage("auto", self._runner.dtype, model.config.text.head_dim)
        self._cache: Cache = NO_CACHE
        self._num_pages = 0
        self._tokens: list[Int[np.ndarray, "B steps"]] = []

    def logits(self, ids: Int[np.ndarray, "B T"]) -> Float[np.ndarray, "B T V"]:
        """Logits of every token, without a cache."""
        graphdef, state = nnx.split(self._model)
        return np.asarray(jax.jit(lambda state, ids: nnx.merge(graphdef, state)(ids))(state, ids))

    def prefill(self, ids: Int[np.ndarray, "B T"], room: int) -> float:
        """Prefills prompts and generates the first tokens; `room` tokens may follow. Returns seconds."""
        shards = self._runner.num_shards
        self._batch_size, length = ids.shape
        # Equally many rows in each shard, the last ones idle; the last token of each is left to the first decode step.
        each = -(-self._batch_size // shards)
        ids = np.pad(ids, ((0, each * shards - self._batch_size), (0, 0)))
        is_idle = np.arange(len(ids)) >= self._batch_size
        row = SamplingRow(SamplingParams(temperature=0.0), room + 1, (0, 0), ())
        self._sampling = sampling_batch([row] * len(ids), self._vocab_size, len(ids))
        width = power_of_two(pages_for(length + room))
        if self._num_pages < len(ids) * width:
            self._num_pages = len(ids) * width
            self._cache = self._runner.allocate_cache(self._num_pages, self._storage)
        first = np.arange(shards)[:, None] * (self._num_pages // shards) + np.arange(each) * width
        table = (first.reshape(-1, 1) + np.arange(width)).astype(np.int32)
        lengths = np.where(is_idle, 0, length - 1).astype(np.int32)
        starts = np.zeros((shards, each + 1), np.int32)
        starts[:, 1:] = np.cumsum(lengths.reshape(shards, each), axis=1)
        packed = np.zeros((shards, power_of_two(each * (length - 1))), np.int32)
        packed[:, : each * (length - 1)] = ids[:, :-1].reshape(shards, -1)
        chunk = PrefillBatch(packed.reshape(-1), starts.reshape(-1), lengths, table)
        self._last, self._tokens, self._cached = ids[:, -1].astype(np.int32), [], lengths
        self._table, self._is_active = chunk.table, ~is_idle
        jax.block_until_ready(self._cache)
        begin = time.perf_counter()
        if length > 1:
            self._cache, _ = self._runner.prefill(self._cache, chunk)
        self.decode(1)
        return time.perf_counter() - begin

    def decode(self, steps: int) -> float:
        """Generates `steps` tokens for each row in one call of the jitted loop. Returns seconds."""
        begin = time.perf_counter()
        call = DecodeCall(self._batch(), self._sampling, steps, max_steps=self._max_steps(steps))
        self._cache, started = self._runner.decode(self._cache, call)
        report = started.result()
        tokens = np.asarray(report.tokens)
        self._tokens.append(tokens[:, :steps])
        self._last, self._cached = tokens[:, steps - 1], self._cached + steps
        return time.perf_counter() - begin

    def tokens(self, count: int) -> Int[np.ndarray, "B count"]:
        """The first tokens generated since the last prefill."""
        return np.concatenate(self._tokens, axis=1)[: self._batch_size, :count]

    def decode_text(self, steps: int = 1) -> str:
        """The compiled decode loop of the last prefill's bucket, as HLO text; "" if it is not a single program here."""
        if not isinstance(self._runner, Runner | ShardedRunner):
            return ""
        cache = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), self._cache)
        program = self._runner.decode_program(cache, self._batch(), self._sampling, max_steps=self._max_steps(steps))
        return program.as_text() or ""

    def _batch(self) -> DecodeBatch:
        num_generated = np.full(self._last.shape, sum(tokens.shape[1] for tokens in self._tokens), np.int32)
        return DecodeBatch(self._last, self._cached, num_generated, self._is_active, self._table)

    @staticmethod
    def _max_steps(steps: int) -> int:
        return max(STEPS_PER_CALL, power_of_two(steps))


def _make_executor(model: Step3, parallel: Parallel | None, afd: AfdChoice | None) -> Executor | Worker:
    if afd is not None:
        return place_executor(afd, model)
    if parallel is None:
        return Runner(model)
    layout = make_layout(fit_parallel(parallel, model.config.text))
    return ShardedRunner(place_model(model, layout), layout)
