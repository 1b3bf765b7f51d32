"""Records an engine's calls to its executor, to replay them without the engine."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.storage import Storage
from step3_jax.cache.paged import Cache
from step3_jax.engine.executor import Executor, Started
from step3_jax.engine.state import DecodeCall, ExpertTokens, PrefillBatch, Report

T = TypeVar("T")


class PageCopies(NamedTuple):
    """The arguments of `Executor.copy_pages`."""

    sources: tuple[int, ...]
    targets: tuple[int, ...]


Call = PrefillBatch | DecodeCall | PageCopies


class Event(NamedTuple):
    """A call, by its number, was dispatched, or waited for."""

    call: int
    is_wait: bool


@dataclasses.dataclass
class Recording:
    """Calls in the order in which they were dispatched and waited for.

    Attributes:
      calls: The calls with the engine's arrays, without the cache.
      events: The order.
    """

    calls: list[Call] = dataclasses.field(default_factory=list)
    events: list[Event] = dataclasses.field(default_factory=list)

    @property
    def num_prefills(self) -> int:
        """Chunks."""
        return sum(isinstance(call, PrefillBatch) for call in self.calls)

    @property
    def num_decodes(self) -> int:
        """Decode calls."""
        return sum(isinstance(call, DecodeCall) for call in self.calls)


class RecordingExecutor(Executor):
    """Passes every call on to another executor, and records it while `record` is entered."""

    def __init__(self, executor: Executor) -> None:
        """Takes the executor that does the work."""
        super().__init__(
            executor.config, executor.devices, executor.dtype, executor.num_shards, executor.num_image_shards
        )
        self.num_traces = executor.num_traces
        self.compile_s = executor.compile_s
        self._executor = executor
        self._recording: Recording | None = None
        self._cache_size: tuple[int, Storage] | None = None

    @contextlib.contextmanager
    def record(self) -> Iterator[Recording]:
        """Calls made inside are added to the recording."""
        recording = Recording()
        self._recording = recording
        try:
            yield recording
        finally:
            self._recording = None

    def new_cache(self) -> Cache:
        """An empty cache of the size that was requested last.

        Raises:
          ValueError: If none was.
        """
        if self._cache_size is None:
            raise ValueError("no cache has been allocated yet: run something first")
        return self._executor.allocate_cache(*self._cache_size)

    def cache_memory_bytes(
        self, rows: int, chunk_tokens: int, step_tokens: int = 1, history_tokens: int = 0
    ) -> int | None:
        """See `Executor.cache_memory_bytes`."""
        return self._executor.cache_memory_bytes(rows, chunk_tokens, step_tokens, history_tokens)

    def allocate_cache(self, num_pages: int, storage: Storage) -> Cache:
        """See `Executor.allocate_cache`."""
        self._cache_size = num_pages, storage
        return self._executor.allocate_cache(num_pages, storage)

    def _encode_images(self, pixels: Float[np.ndarray, "images 3 S S"]) -> Float[Array, "images tokens D"]:
        return jax.numpy.asarray(self._executor.encode_images(pixels))

    def prefill(self, cache: Cache, batch: PrefillBatch) -> tuple[Cache, Started[ExpertTokens]]:
        """See `Executor.prefill`."""
        cache, started = self._executor.prefill(cache, batch)
        return cache, self._note(batch, started)

    def decode(self, cache: Cache, call: DecodeCall) -> tuple[Cache, Started[Report]]:
        """See `Executor.decode`."""
        cache, started = self._executor.decode(cache, call)
        return cache, self._note(call, started)

    def copy_pages(self, cache: Cache, sources: Sequence[int], targets: Sequence[int]) -> Cache:
        """See `Executor.copy_pages`."""
        self._note(PageCopies(tuple(sources), tuple(targets)), Started(None))
        return self._executor.copy_pages(cache, sources, targets)

    def _note(self, call: Call, started: Started[T]) -> Started[T]:
        self.compile_s = self._executor.compile_s
        recording = self._recording
        if recording is None:
            return started
        recording.calls.append(call)
        number = len(recording.calls) - 1
        recording.events.append(Event(number, is_wait=False))
        return _Noted(started, recording, number)


@dataclasses.dataclass
class Replay:
    """The results of replayed calls.

    Attributes:
      cache: The cache after the last one.
      seconds: From the first dispatch to the last wait.
      reports: Reports of the decode calls, in order.
    """

    cache: Cache
    seconds: float
    reports: list[Report]


def replay(executor: Executor, recording: Recording, cache: Cache) -> Replay:
    """Replays recorded calls, dispatching and waiting in the recorded order, and nothing else.

    Args:
      executor: The one that made them, or a similar one.
      recording: The calls. Everything they read from the cache must have been written by one of them, or be in `cache`.
      cache: A cache of the same size; it is consumed.
    """
    under_way: dict[int, Started[ExpertTokens] | Started[Report]] = {}
    reports: list[Report] = []
    jax.block_until_ready(cache)
    begin = time.perf_counter()
    for number, is_wait in recording.events:
        call = recording.calls[number]
        if is_wait:
            result = under_way.pop(number).result()
            if isinstance(call, DecodeCall):
                reports.append(result)  # type: ignore[arg-type]
        else:
            cache, started = dispatch(executor, cache, call)
            if started is not None:
                under_way[number] = started
    seconds = time.perf_counter() - begin
    return Replay(cache, seconds, reports)


def call_seconds(executor: Executor, recording: Recording, cache: Cache) -> tuple[Cache, list[float]]:
    """Replays recorded calls, each after the previous one has ended; arguments as for `replay`.

    Returns:
      The cache after the last one, and the seconds of each.
    """
    seconds = []
    for call in recording.calls:
        jax.block_until_ready(cache)
        begin = time.perf_counter()
        cache, started = dispatch(executor, cache, call)
        if started is not None:
            started.result()
        else:
            jax.block_until_ready(cache)
        seconds.append(time.perf_counter() - begin)
    return cache, seconds


def dispatch(
    executor: Executor, cache: Cache, call: Call
) -> tuple[Cache, Started[ExpertTokens] | Started[Report] | None]:
    """Makes a recorded call; None if there is nothing to wait for."""
    if isinstance(call, PrefillBatch):
        return executor.prefill(cache, call)
    if isinstance(call, DecodeCall):
        return executor.decode(cache, call)
    return executor.copy_pages(cache, *call), None


class _Noted(Started[T]):
    """Records when it is waited for."""

    def __init__(self, started: Started[T], recording: Recording, number: int) -> None:
        self._started, self._recording, self._number = started, recording, number

    def result(self) -> T:
        self._recording.events.append(Event(self._number, is_wait=True))
        return self._started.result()
