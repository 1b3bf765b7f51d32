"""The engine core: one owner steps it, any thread may add requests or abort them. Plain data in and out, no text.

Each step takes new requests, collects the decode call in flight, dispatches the next one, and only then delivers
the generated tokens, so that detokenizing overlaps with the device's work. A call that fails ends the requests that ran in
it; all others are recomputed, with the same tokens.
"""

from __future__ import annotations

import collections
import threading
import time

import jax

from pallas_kernels.storage import PAGE_SIZE
from step3_jax.cache.allocator import PageAllocator
from step3_jax.cache.paged import Cache, choose_storage
from step3_jax.cache.prefix import image_marks, root_key
from step3_jax.channel.failure import RunLostError
from step3_jax.engine.bucket_table import PAGE_COPIES, BucketTable
from step3_jax.engine.config import EngineConfig
from step3_jax.engine.constrainer import Constrainer
from step3_jax.engine.constraint import SequenceConstraint
from step3_jax.engine.executor import Executor
from step3_jax.engine.failure import CallError, blame
from step3_jax.engine.flight import Abort, Flight
from step3_jax.engine.media import FeatureCache
from step3_jax.engine.pace import Pace
from step3_jax.engine.pack import Packer
from step3_jax.engine.request import ABORTED, FAILED, OutputSink, Request, SequenceOutput, check_request
from step3_jax.engine.scheduler import Chunk, Scheduler
from step3_jax.engine.sequence import Group, Sequence
from step3_jax.engine.state import FULL, STOPPED, Report
from step3_jax.engine.stats import EngineStats
from step3_jax.engine.warm_up import Progress, warm_up
from step3_jax.layout.page import count_pages, page_bytes, pages_for
from step3_jax.sampling.batch import SamplingRow, check_token_ids, seed_words
from step3_jax.sampling.sampler import StepLogprobs

# The cache's memory where devices do not report what is free, unless one sequence needs more.
DEFAULT_CACHE_BYTES = 2**28

_FINISH = {STOPPED: "stop", FULL: "length"}


class EngineCore:
    """Runs requests on an executor, as many at once as slots and pages allow, with continuous batching.

    `step` must be called by one thread at a time; `check`, `add`, `abort` and the properties may be used from any.

    Attributes:
      config: The settings.
      max_model_len: Most tokens of prompt and output together.
      stats: Counts and times so far.
      buckets: The sizes of its calls.
      allocator: Allocates the cache's pages.
      scheduler: Schedules the sequences.
    """

    def __init__(
        self,
        executor: Executor,
        config: EngineConfig,
        *,
        max_model_len: int,
        eos_ids: tuple[int, ...] = (),
        image_sizes: tuple[int, ...] = (),
    ) -> None:
        """Prepares an engine. The cache itself is allocated with the first request.

        Args:
          executor: Runs the model.
          config: The settings.
          max_model_len: Most tokens of prompt and output together, where the configuration leaves it to the model.
          eos_ids: The model's own end tokens.
          image_sizes: Sides of views and windows in pixels; none for a text-only model.

        Raises:
          ValueError: If the cache format does not serve the model's head size, or the memory does not hold one sequence of
            `max_model_len`.
        """
        speculation = config.speculation
        self.config = config
        self.max_model_len = max_model_len
        self.stats = EngineStats()
        self._executor = executor
        self._eos_ids = eos_ids
        shards, images, pages = executor.num_shards, executor.num_image_shards, pages_for(max_model_len)
        width = 1 if speculation is None else speculation.width
        self.buckets = BucketTable.of(
            config, max_pages=pages, num_shards=shards, num_image_shards=images, image_sizes=image_sizes
        )
        text = executor.config.text
        self._vocab_size = text.vocab_size
        self._storage = choose_storage(config.kv_cache_dtype, executor.dtype, text.head_dim)
        memory = config.kv_cache_memory_bytes
        if memory is None:
            rows = self.buckets.max_num_seqs
            tokens = self.buckets.max_num_batched_tokens, width, rows * self.buckets.max_pages * PAGE_SIZE
            memory = executor.cache_memory_bytes(rows, *tokens)
        if memory is None:
            memory = max(DEFAULT_CACHE_BYTES, pages * page_bytes(text, self._storage))
        max_num_seqs = self.buckets.max_num_seqs
        num_pages = count_pages(
            text, self._storage, max_model_len=max_model_len, max_num_seqs=max_num_seqs, memory_bytes=memory
        )
        self.allocator = PageAllocator(num_pages * shards, shards)
        long_tokens = config.long_prefill_token_threshold
        self.scheduler = Scheduler(
            self.allocator,
            buckets=self.buckets,
            long_prefill_tokens=None if long_tokens is None else max(1, long_tokens // shards),
            has_prefix_cache=config.enable_prefix_caching,
        )
        self._packer = Packer(self.buckets, self._vocab_size, speculation)
        self._features = FeatureCache(executor, self.buckets.images, self.stats)
        self._constrainer = Constrainer()
        self._cache: Cache | None = None
        self._flight: Flight | None = None
        self._pace = Pace(max_steps=self.buckets.max_steps, max_call_ms=config.max_call_ms, step_width=width)
        # What other threads pass in, and what they may read meanwhile.
        self._lock = threading.Lock()
        self._inbox: collections.deque[Group | Abort] = collections.deque()
        self._sinks: dict[str, OutputSink] = {}
        self._groups: dict[str, Group] = {}
        self._num_sequences = 0
        self._outbox: list[tuple[OutputSink, SequenceOutput]] = []

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        return bool(self._inbox or self._groups)

    @property
    def num_running(self) -> int:
        """Sequences that have a slot."""
        return len(self.scheduler.running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for one, each of a request's `n`."""
        return max(0, self._num_sequences - self.num_running)

    @property
    def num_traced(self) -> int:
        """Programs traced so far, including one that is being compiled."""
        return sum(tuple(self._executor.num_traces.values()))

    def check_executor(self) -> None:
        """Raises RunLostError if one of several processes is lost, so that no more calls can be made."""
        self._executor.check()

    def check(self, request: Request) -> None:
        """Raises ValueError (ContextLengthError) if a request cannot be served; the message says what would be."""
        check_request(request, max_model_len=self.max_model_len, vocab_size=self._vocab_size)
        check_token_ids(self._sampling_row(request, 0), self._vocab_size)

    def add(self, request: Request, sink: OutputSink) -> None:
        """Adds a request; it joins with the next step.

        Args:
          request: The request.
          sink: Receives its outputs, on the thread that steps. The last one of each sequence has a `finish`.

        Raises:
          ValueError: As `check`, or if another request has the same id.
        """
        self.check(request)
        group = self._make_group(request)
        with self._lock:
            if request.request_id in self._sinks:
                raise ValueError(f"request_id {request.request_id!r} is in use; each request needs its own")
            self._sinks[request.request_id] = sink
        self._inbox.append(group)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Ends a request, or one of its sequences, with the next step; does nothing if it has ended.

        Args:
          request_id: The request's id.
          index: The sequence's number; None for all of them.
        """
        self._inbox.append(Abort(request_id, index))

    def step(self) -> None:
        """One step: admits sequences, prefills a chunk, and makes one decode call for those whose prompt is prefilled.

        While prompts are prefilled, decoding sequences get one token per step, so that neither waits for the other.

        Raises:
          BaseException: What interrupted it, such as KeyboardInterrupt; all sequences are then recomputed. A call that
            fails raises nothing: its requests end with the reason.
          RunLostError: If one of several processes is lost, so that no more calls can be made.
        """
        try:
            self._take_inbox()
            if self._flight is None:
                self._flight = self._dispatch()
            flight, self._flight = self._flight, None
            if flight is not None:
                self._collect(flight)
                if self._may_lead():
                    self._take_inbox()
                    self._flight = self._dispatch()
        except CallError as failure:
            self._recover()
            if isinstance(failure.error, RunLostError):
                raise failure.error from None
            text = f"{type(failure.error).__name__}: {failure.error}"
            for group in {id(one.group): one.group for one in failure.sequences}.values():
                self._fail(group, f"the call that computed it failed: {text}")
        except BaseException:
            self._recover()
            raise
        finally:
            self._deliver()

    def warm_up(self, progress: Progress | None = None) -> None:
        """Compiles every program a request can need, see `engine.warm_up`; like `step`, for one thread at a time."""
        try:
            self._cache = warm_up(self._executor, self._take_cache(), self.buckets, self._packer, progress)
        except BaseException:
            self._recover()
            raise
        self.stats.count_compilations(self._executor.compile_s, self._executor.num_traces)

    def settle(self) -> None:
        """Takes new requests and aborts without computing, so that aborted ones free their pages; otherwise like `step`."""
        try:
            self._take_inbox()
        finally:
            self._deliver()

    def _take_inbox(self) -> None:
        while self._inbox:
            given = self._inbox.popleft()
            if isinstance(given, Group):
                self._groups[given.request.request_id] = given
                self._num_sequences += len(given.sequences)
                # The others share the prompt's pages once the first has prefilled it.
                self.scheduler.add(given.sequences[:1])
                continue
            group = self._groups.get(given.request_id)
            for sequence in () if group is None else tuple(group.sequences):
                if given.index in (None, sequence.index):
                    self._finish(sequence, ABORTED)

    def _make_group(self, request: Request) -> Group:
        """A request's sequences."""
        prompt = request.prompt
        images = [(image.digest, image.num_features) for image in prompt.images]
        group = Group(
            request,
            root_key(self._storage, prompt.cache_salt),
            image_marks(prompt.image_places, images) if images else {},
            self._now(),
            self._executor.compile_s,
        )
        for index in range(request.params.n):
            ids = list(prompt.token_ids)
            row = self._sampling_row(request, index)
            constraint = None if request.constraint is None else SequenceConstraint(request.constraint)
            group.sequences.append(
                Sequence(group, index, row, request.steps_per_call, ids, len(ids), constraint=constraint)
            )
        return group

    def _sampling_row(self, request: Request, index: int) -> SamplingRow:
        params = request.params
        room = self.max_model_len - len(request.prompt.token_ids)
        eos_ids = () if params.ignore_eos else self._eos_ids
        return SamplingRow(
            params=params,
            max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            seed_words=seed_words(request.seed, index),
            stop_ids=tuple(dict.fromkeys((*eos_ids, *params.stop_token_ids))),
            pause_id=request.pause_id,
        )

    def _dispatch(self) -> Flight | None:
        """Starts the calls of a round; None if there is nothing to do."""
        scheduler = self.scheduler
        copies = scheduler.admit()
        flight = Flight(self._now())
        if copies:
            with blame([one for one in scheduler.running if one.group.request.params.n > 1]):
                for first in range(0, len(copies), PAGE_COPIES):
                    sources, targets = zip(*copies[first : first + PAGE_COPIES], strict=True)
                    self._cache = self._executor.copy_pages(self._take_cache(), sources, targets)
        self._constrain()
        chunks = self._encode_images(scheduler.plan_chunk())
        if chunks:
            self._prefill(chunks, flight)
        if any(one.is_ready for one in scheduler.running):
            self._decode(flight)
        return flight if flight.prefill is not None or flight.decode is not None else None

    def _constrain(self) -> None:
        """Gives constrained sequences their forced tokens, to be prefilled; ends those that cannot continue."""
        for sequence, forced, error in self._constrainer.advance(self.scheduler):
            if error:
                self._fail(sequence.group, error)
                continue
            self._append(sequence, forced)
            self.stats.num_generated_tokens += len(forced)
            self._send(sequence, forced, "", None)

    def _encode_images(self, chunks: list[Chunk]) -> list[Chunk]:
        """The chunks whose images, if any, are encoded; a request whose images fail ends."""
        kept = []
        for chunk in chunks:
            group = chunk.sequence.group
            if chunk.sequence.is_finished:
                continue
            places = group.request.prompt.image_places
            end = chunk.start + chunk.num_tokens
            if group.features is None and any(chunk.start <= place < end for place in places):
                try:
                    group.features = self._features.encode(group.request.prompt.images)
                except RunLostError:
                    raise
                except Exception as error:
                    self._fail(group, f"its images could not be encoded: {type(error).__name__}: {error}")
                    continue
            kept.append(chunk)
        return kept

    def _prefill(self, chunks: list[Chunk], flight: Flight) -> None:
        scheduler, executor = self.scheduler, self._executor
        with blame([chunk.sequence for chunk in chunks]):
            batch = self._packer.chunk(chunks, [scheduler.shard_of(chunk.sequence) for chunk in chunks])
            self._cache, flight.prefill = executor.prefill(self._take_cache(), batch)
        flight.chunks = chunks
        for chunk in chunks:
            sequence = chunk.sequence
            sequence.num_computed += chunk.num_tokens
            self.stats.num_prefilled_tokens += chunk.num_tokens
            scheduler.publish(sequence)
            if not sequence.num_to_prefill:
                sequence.group.features = None

    def _decode(self, flight: Flight) -> None:
        scheduler = self.scheduler
        for sequence in scheduler.running:
            if sequence.is_ready:
                # Those that share its prompt may join, in the next round.
                scheduler.fork(sequence)
        size = self._pace.choose((one for one in scheduler.running if one.is_ready), has_prefill=scheduler.has_prefill)
        num_tokens, stuck = scheduler.make_room(size.num_tokens)
        num_steps = min(size.num_steps, num_tokens)
        for sequence in stuck:
            self._finish(sequence, "length")
        begin = time.perf_counter()
        masks, failed = self._constrainer.fill_masks(scheduler, self._vocab_size)
        self.stats.mask_s += time.perf_counter() - begin
        for sequence, error in failed:
            self._fail(sequence.group, error)
        slots = [one if one is not None and one.is_ready else None for one in scheduler.slots]
        ready = [one for one in slots if one is not None]
        if not ready:
            return
        with blame(ready):
            call = self._packer.decode(scheduler, num_steps, masks, max_new=num_tokens)
            self._cache, flight.decode = self._executor.decode(self._take_cache(), call)
        flight.slots, flight.num_steps = slots, num_steps

    def _may_lead(self) -> bool:
        """Whether the next calls may be dispatched before the generated tokens are examined.

        A stop string ends its sequence only once the text is known; until then no step is spent on it.
        """
        return not any(one.sampling.params.stop for one in self.scheduler.running)

    def _collect(self, flight: Flight) -> None:
        """Waits for a round's calls and takes the generated tokens."""
        stats = self.stats
        if flight.prefill is not None:
            with blame([chunk.sequence for chunk in flight.chunks]):
                counts = flight.prefill.result()
            if counts is not None:
                stats.count_experts(counts.sum(axis=0))
            stats.prefill_s += self._now() - flight.start_s
        if flight.decode is not None:
            begin = self._now()
            start = begin if flight.prefill is not None else flight.start_s
            with blame([one for one in flight.slots if one is not None]):
                report = flight.decode.result()
            end = self._now()
            stats.count_decode(report, self._pace.measure(report, end - start, end - begin))
            for slot, sequence in enumerate(flight.slots):
                if sequence is not None and not sequence.is_finished:
                    self._take(sequence, report, slot)
        stats.count_compilations(self._executor.compile_s, self._executor.num_traces)
        stats.afd_wait_s = self._executor.afd_wait_s
        stats.num_preemptions = self.scheduler.num_preemptions
        stats.prefix_cache_queries = self.scheduler.num_queries
        stats.prefix_cache_hits = self.scheduler.num_hits

    def _take(self, sequence: Sequence, report: Report, slot: int) -> None:
        """Takes the tokens that a decode call generated for a sequence."""
        count = int(report.num_new[slot])
        new = report.tokens[slot, :count].tolist()
        logprobs = None
        if report.logprobs is not None and sequence.sampling.params.logprobs is not None:
            logprobs = jax.tree.map(lambda buffer: buffer[slot, :count], report.logprobs)
        self._append(sequence, new)
        sequence.num_computed += count
        self.scheduler.publish(sequence)
        finish = _FINISH.get(int(report.finish[slot]), "")
        if finish == "stop" and new[-1] not in sequence.sampling.stop_ids:
            finish = ""  # It only paused.
        self._send(sequence, new, finish, logprobs)
        if finish:
            self._end(sequence)

    def _append(self, sequence: Sequence, new: list[int]) -> None:
        if not sequence.num_output and not sequence.index:
            self.stats.num_prompt_tokens += sequence.num_prompt
        sequence.token_ids += new

    def _finish(self, sequence: Sequence, finish: str, error: str = "") -> None:
        """Ends a sequence without new tokens."""
        if not sequence.is_finished:
            self._send(sequence, [], finish, None, error)
            self._end(sequence)

    def _fail(self, group: Group, error: str) -> None:
        for sequence in tuple(group.sequences):
            self._finish(sequence, FAILED, error)

    def _end(self, sequence: Sequence) -> None:
        group = sequence.group
        self._num_sequences -= 1
        self.scheduler.release(sequence)
        if group.is_finished:
            del self._groups[group.request.request_id]
            with self._lock:
                del self._sinks[group.request.request_id]
            self.stats.num_requests += 1
            return
        # If it was prefilling the prompt for the others, the next one takes over.
        if all(one.is_finished or not one.pages for one in group.sequences):
            waiting = [one for one in group.sequences if not one.is_finished]
            if not any(self.scheduler.is_queued(one) for one in waiting):
                self.scheduler.add(waiting[:1])

    def _send(
        self, sequence: Sequence, new: list[int], finish: str, logprobs: StepLogprobs | None, error: str = ""
    ) -> None:
        group = sequence.group
        output = SequenceOutput(
            group.request.request_id,
            sequence.index,
            tuple(new),
            finish,
            logprobs,
            error,
            group.num_cached_tokens or 0,
            self._now() - group.start_s,
            self._executor.compile_s - group.compile_start_s,
            group.admitted_s,
        )
        sequence.num_sent += len(new)
        self._outbox.append((self._sinks[group.request.request_id], output))

    def _deliver(self) -> None:
        outbox, self._outbox = self._outbox, []
        for sink, output in outbox:
            sink.put(output)

    def _recover(self) -> None:
        """Drops the cache's contents, which are unknown after a failure; all sequences are recomputed."""
        self._cache = None
        self._flight = None
        self._packer.forget()
        self.scheduler.preempt_all()
        for group in self._groups.values():
            group.features = None
            for sequence in group.sequences:
                # Tokens that were not delivered are generated again.
                del sequence.token_ids[sequence.num_prompt + sequence.num_sent :]
                del sequence.page_keys[len(sequence.token_ids) // PAGE_SIZE :]

    def _take_cache(self) -> Cache:
        """The cache, for a call that consumes it."""
        if self._cache is None:
            return self._executor.allocate_cache(self.allocator.num_pages, self._storage)
        cache, self._cache = self._cache, None
        return cache

    def _now(self) -> float:
        """A clock that stops while programs are compiled."""
        return time.perf_counter() - self._executor.compile_s
