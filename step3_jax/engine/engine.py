"""Requests to completions: round after round a chunk of prompts is read and a decode call made, for whoever runs then."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
from jaxtyping import Array, Int

from pallas_kernels.pages import PAGE_SIZE
from step3_jax.cache.allocator import PageAllocator
from step3_jax.cache.bucket import power_of_two
from step3_jax.cache.paged import Cache, choose_storage, count_pages, page_bytes, pages_for
from step3_jax.engine.completion import Completion
from step3_jax.engine.executor import Executor
from step3_jax.engine.job import Job, Row
from step3_jax.engine.media import chunk_features
from step3_jax.engine.pack import pack_chunk, pack_decode, pack_sampling, pack_table
from step3_jax.engine.request import Request, RequestOutput, StreamPiece
from step3_jax.engine.scheduler import Chunk, Scheduler
from step3_jax.engine.state import DecodeCall, Report
from step3_jax.engine.stats import EngineStats
from step3_jax.sampling.batch import (
    SamplingBatch,
    SamplingMode,
    SamplingRow,
    check_token_ids,
    sampling_mode,
    seed_words,
)
from step3_jax.text.tokenizer import Tokenizer

# Steps between two looks of the host when nobody is streaming: the most that a stop string wastes.
STEPS_PER_CALL = 32
# The cache's memory where devices do not say what is left, unless one sequence needs more.
DEFAULT_CACHE_BYTES = 2**28


class _Packed(NamedTuple):
    """What of a decode call depends on who is in which slot alone; it is kept until that changes."""

    version: int
    mode: SamplingMode
    sampling: SamplingBatch
    table: Int[Array, "B width"]


class Engine:
    """Runs requests on an executor, as many at once as slots and pages allow; new ones join while others run.

    Attributes:
      stats: Counts and times so far.
      allocator: Of the cache's pages.
    """

    def __init__(
        self,
        executor: Executor,
        tokenizer: Tokenizer | None,
        *,
        max_model_len: int,
        eos_ids: Sequence[int],
        max_batch_size: int,
        max_num_batched_tokens: int,
        kv_cache_dtype: str = "auto",
        kv_cache_memory_bytes: int | None = None,
    ) -> None:
        """Prepares an engine. The cache itself is made with the first request.

        Args:
          executor: Runs the model.
          tokenizer: Makes text; None gives token ids alone.
          max_model_len: Most tokens of prompt and output together.
          eos_ids: The model's own end tokens.
          max_batch_size: Most sequences at once; what each shard has of them is rounded down to a power of two.
          max_num_batched_tokens: Most prompt tokens read at once, by all shards together; longer prompts are read in
            chunks.
          kv_cache_dtype: Format of the cache, see `cache.paged.KV_CACHE_DTYPES`.
          kv_cache_memory_bytes: Memory of the cache, of each shard if there are several. None takes what the device has
            left, at most what `max_batch_size` sequences of `max_model_len` need.

        Raises:
          ValueError: If a limit is not positive, the format does not exist or does not serve the model's head size, or
            the memory does not hold one sequence of `max_model_len`.
        """
        for name, value in (
            ("max_model_len", max_model_len),
            ("max_batch_size", max_batch_size),
            ("max_num_batched_tokens", max_num_batched_tokens),
            ("kv_cache_memory_bytes", 1 if kv_cache_memory_bytes is None else kv_cache_memory_bytes),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}; a whole number of at least 1 is needed")
        self.stats = EngineStats()
        self._executor = executor
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._eos_ids = tuple(eos_ids)
        # Of each shard.
        self._max_batch_size = 1 << (max(1, max_batch_size // executor.num_shards).bit_length() - 1)
        self._max_num_batched_tokens = max(1, max_num_batched_tokens // executor.num_shards)
        self._max_pages = pages_for(max_model_len)
        text = executor.config.text
        self._vocab_size = text.vocab_size
        self._storage = choose_storage(kv_cache_dtype, executor.dtype, text.head_dim)
        memory = executor.cache_memory_bytes() if kv_cache_memory_bytes is None else kv_cache_memory_bytes
        if memory is None:
            memory = max(DEFAULT_CACHE_BYTES, self._max_pages * page_bytes(text, self._storage))
        num_pages = count_pages(
            text,
            self._storage,
            max_model_len=max_model_len,
            max_batch_size=self._max_batch_size,
            memory_bytes=memory,
        )
        self.allocator = PageAllocator(num_pages * executor.num_shards, executor.num_shards)
        self._scheduler = Scheduler(
            self.allocator, max_batch_size=self._max_batch_size, max_num_batched_tokens=self._max_num_batched_tokens
        )
        self._cache: Cache | None = None
        self._packed: _Packed | None = None

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        return bool(self._scheduler.running or self._scheduler.num_waiting)

    @property
    def num_running(self) -> int:
        """Sequences that have a slot."""
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for one."""
        return self._scheduler.num_waiting

    def check(self, request: Request) -> None:
        """Raises ValueError if a request cannot be served; the message says what would be."""
        prompt, params = request.prompt, request.params
        num_tokens, limit = len(prompt.token_ids), self._max_model_len
        if not num_tokens:
            raise ValueError("the prompt has no tokens; at least one is needed")
        outside = [token for token in prompt.token_ids if not 0 <= token < self._vocab_size]
        if outside:
            raise ValueError(f"the prompt has token ids {outside[:8]}; allowed: 0 to {self._vocab_size - 1}")
        if num_tokens - 1 in prompt.image_places:
            raise ValueError("the prompt ends with a picture's place; at least one token is needed behind it")
        num_output = params.max_tokens or max(1, params.min_tokens)
        if num_tokens + num_output > limit:
            raise ValueError(
                f"the prompt has {num_tokens} tokens and {num_output} more are asked for, together "
                f"{num_tokens + num_output}; at most max_model_len = {limit} are allowed: shorten the prompt, lower "
                "max_tokens, or load with a larger max_model_len"
            )
        if params.stop and self._tokenizer is None:
            raise ValueError("stop strings need a tokenizer, and this model has none: give stop_token_ids")
        check_token_ids(self._sampling_row(request, 0), self._vocab_size)

    def generate(self, requests: Sequence[Request]) -> list[RequestOutput]:
        """Runs requests that `check` lets pass; the outputs come in their order."""
        jobs: list[Job] = []
        for _ in self._run(requests, STEPS_PER_CALL, jobs):
            pass
        return [job.output() for job in jobs]

    def stream(self, requests: Sequence[Request], steps_per_piece: int) -> Iterator[StreamPiece]:
        """Runs requests that `check` lets pass, with news of each row every `steps_per_piece` tokens.

        Leaving the iterator early ends the work.
        """
        return self._run(requests, steps_per_piece, [])

    def add(self, request: Request, steps_per_piece: int = STEPS_PER_CALL) -> Job:
        """Puts a request that `check` lets pass into the queue.

        Args:
          request: What is asked for.
          steps_per_piece: Most decode steps between two of its pieces.

        Returns:
          The job; `step` adds to its `pieces`.
        """
        job = Job(request, steps_per_piece, self._now(), self._executor.compile_s)
        for sample in range(request.params.n):
            completion = Completion(request, sample, self._tokenizer, self._eos_ids)
            job.rows.append(Row(job, completion, self._sampling_row(request, sample)))
        self._scheduler.add(job.rows)
        return job

    def abort(self, job: Job) -> None:
        """Ends a job's work and frees its pages; nothing happens if it has ended."""
        for row in job.rows:
            self._scheduler.release(row)

    def step(self) -> None:
        """One round: admits rows, reads a chunk of prompts, and makes tokens of all rows whose prompt is read.

        While prompts are being read the rows that decode make one token a round, so that neither waits for the other.

        If a round is interrupted or fails, what the cache holds is unknown: then all jobs are lost, and the next round
        begins with an empty cache.
        """
        try:
            self._scheduler.admit()
            chunks = self._scheduler.plan_chunk()
            if chunks:
                self._prefill(chunks)
            if any(row.is_ready for row in self._scheduler.running):
                self._decode()
        except BaseException:
            for row in self._scheduler.clear():
                row.job.is_lost = True
            self._cache = None
            raise

    def _run(self, requests: Sequence[Request], steps_per_piece: int, jobs: list[Job]) -> Iterator[StreamPiece]:
        """Steps until these requests have ended; their jobs are put into `jobs`."""
        try:
            jobs.extend(self.add(request, steps_per_piece) for request in requests)
            while True:
                for job in jobs:
                    while job.pieces:
                        yield job.pieces.popleft()
                if all(job.is_done for job in jobs):
                    return
                if any(job.is_lost for job in jobs):
                    raise RuntimeError("the engine failed or was interrupted in another call: give the prompts again")
                self.step()
        finally:
            for job in jobs:
                self.abort(job)

    def _sampling_row(self, request: Request, sample: int) -> SamplingRow:
        params = request.params
        eos_ids = () if params.ignore_eos else self._eos_ids
        return SamplingRow(
            params=params,
            max_tokens=params.max_tokens or self._max_model_len - len(request.prompt.token_ids),
            seed_words=seed_words(request.seed, sample),
            stop_ids=tuple(dict.fromkeys((*eos_ids, *params.stop_token_ids))),
        )

    def _take_cache(self) -> Cache:
        """The cache for a call that consumes it."""
        if self._cache is None:
            return self._executor.allocate_cache(self.allocator.num_pages, self._storage)
        cache, self._cache = self._cache, None
        return cache

    def _prefill(self, chunks: Sequence[Chunk]) -> None:
        stats, executor = self.stats, self._executor
        start, compiled = self._now(), executor.compile_s
        features, feature_rows = chunk_features(executor, chunks)
        batch = pack_chunk(
            chunks,
            max_batch_size=self._max_batch_size,
            max_num_batched_tokens=self._max_num_batched_tokens,
            max_pages=self._max_pages,
            shards=[self._scheduler.shard_of(chunk.row) for chunk in chunks],
            num_shards=executor.num_shards,
            features=features,
            feature_rows=feature_rows,
        )
        self._cache = executor.prefill(self._take_cache(), batch)
        # Without waiting the decode call would seem to take the chunk's time.
        jax.block_until_ready(self._cache)
        for chunk in chunks:
            chunk.row.num_read += chunk.num_tokens
            job = chunk.row.job
            if not any(row.num_unread for row in job.rows):
                job.features = job.feature_rows = None
        stats.prefill_s += self._now() - start
        stats.compile_s += executor.compile_s - compiled

    def _decode(self) -> None:
        stats, executor, slots = self.stats, self._executor, self._scheduler.slots
        ready = [row is not None and row.is_ready for row in slots]
        rows = [row for row in self._scheduler.running if row.is_ready]
        num_steps = 1
        # A first token comes by itself, and as soon as it can.
        if not self._scheduler.has_unread and all(row.made for row in rows):
            num_steps = min(row.job.steps_per_piece for row in rows)
        packed = self._pack()
        batch = pack_decode(
            slots,
            packed.table,
            page_size=PAGE_SIZE,
            vocab_size=self._vocab_size,
            has_history=packed.mode.use_penalties,
        )
        start, compiled = self._now(), executor.compile_s
        call = DecodeCall(
            batch,
            packed.sampling,
            packed.mode,
            num_steps,
            max_steps=max(STEPS_PER_CALL, power_of_two(num_steps)),
            leave_early=self._scheduler.num_waiting > 0,
        )
        self._cache, report = executor.decode(self._take_cache(), call)
        report = jax.device_get(report)
        elapsed = self._now() - start
        stats.decode_s += elapsed
        stats.compile_s += executor.compile_s - compiled
        stats.num_generated_tokens += int(report.num_new.sum())
        taken = int(report.num_new.max())
        for slot, (row, is_ready) in enumerate(zip(tuple(slots), ready, strict=True)):
            if row is not None and is_ready:
                self._push(row, report, slot, elapsed * float(report.num_new[slot]) / max(taken, 1))

    def _pack(self) -> _Packed:
        scheduler, packed = self._scheduler, self._packed
        if packed is None or packed.version != scheduler.version:
            params = [row.sampling.params for row in scheduler.running]
            packed = _Packed(
                scheduler.version,
                sampling_mode(params, self._vocab_size),
                pack_sampling(scheduler.slots, self._vocab_size),
                pack_table(scheduler.slots, self._max_pages),
            )
            self._packed = packed
        return packed

    def _push(self, row: Row, report: Report, slot: int, elapsed: float) -> None:
        """Hands a row what the device made of it, in `elapsed` seconds."""
        new = report.tokens[slot, : int(report.num_new[slot])].tolist()
        job = row.job
        row.compile_s = self._executor.compile_s - job.compile_start_s
        if row.made:
            # A row that ended in the middle of a call took its part of the call's steps.
            row.decode_s += elapsed
        else:
            row.first_token_s = self._now() - job.start_s
            self.stats.num_prompt_tokens += len(row.prompt.token_ids)
        row.made += new
        logprobs = report.logprobs and jax.tree.map(lambda buffer: buffer[slot, : len(new)], report.logprobs)
        piece = row.completion.push(new, int(report.finish[slot]), logprobs)
        if piece is not None:
            job.pieces.append(piece)
        if row.is_done:
            self._scheduler.release(row)
            self.stats.num_requests += job.is_done

    def _now(self) -> float:
        """A clock that stands still while programs are compiled."""
        return time.perf_counter() - self._executor.compile_s
