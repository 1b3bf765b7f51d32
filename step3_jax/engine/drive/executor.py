"""Rank 0's executor in a run of several processes: each call goes to all workers, and to its own executor."""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import queue
import threading
from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.storage import Storage
from step3_jax.beacon import Beacon
from step3_jax.cache.paged import NO_CACHE, Cache
from step3_jax.channel.driver import DriverChannel
from step3_jax.channel.failure import RunLostError
from step3_jax.engine.drive.call import (
    AllocateCache,
    Call,
    CopyPages,
    Decode,
    EncodeImages,
    MeasureMemory,
    Prefill,
    page_numbers,
    sizes_of,
    to_message,
)
from step3_jax.engine.drive.worker import FOLLOW_S, CachedWorker
from step3_jax.engine.executor import Executor, Started
from step3_jax.engine.state import DecodeCall, ExpertTokens, PrefillBatch, Report
from step3_jax.layout.role import Role

# Memory is known immediately; a worker that does not report it has stopped.
_ANSWER_S = 120.0
_FOLLOW_SLICES = 5
# Longest wait for the calls in flight when the run is to end.
_CLOSE_S = 10.0


class DrivenExecutor(Executor):
    """Makes each call in all processes at once, and returns the results of this one.

    This process's part runs in its own thread. So a wait for it ends when another rank is lost, even if native code is
    still blocked; and the thread that steps continues while a call is dispatched. The workers keep the cache, so the engine
    gets none.
    """

    def __init__(self, own: Executor, channel: DriverChannel) -> None:
        """Takes this process's executor, and the channel to the workers, which are ready."""
        super().__init__(own.config, own.devices, own.dtype, own.num_shards, own.num_image_shards)
        self._own = own
        self.num_traces = own.num_traces
        self._channel = channel
        self._worker = CachedWorker(own)
        self._beacon = Beacon.from_environment()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._is_lost = False
        self._last: _Awaited | None = None
        self._waiting: set[_Job] = set()
        channel.on_failure(self._end_waits)
        self._thread = threading.Thread(target=self._run_jobs, name="step3-device", daemon=True)
        self._thread.start()
        # The interpreter must not exit in the middle of a call.
        atexit.register(self.close)

    @property
    def num_processes(self) -> int:
        """See `Executor.num_processes`."""
        return self._own.num_processes

    @property
    def role(self) -> Role:
        """See `Executor.role`."""
        return self._own.role

    @property
    def num_microbatches(self) -> int:
        """See `Executor.num_microbatches`."""
        return self._own.num_microbatches

    def check(self) -> None:
        """See `Executor.check`."""
        self._channel.check()

    def close(self) -> None:
        """Ends the run after the calls in flight: the workers leave. No more calls can be made."""
        atexit.unregister(self.close)
        self._jobs.put(None)
        if not self._is_lost:
            self._thread.join(_CLOSE_S)
        self._channel.close()

    def cache_memory_bytes(
        self, rows: int, chunk_tokens: int, step_tokens: int = 1, history_tokens: int = 0
    ) -> int | None:
        """See `Executor.cache_memory_bytes`: the least of all processes that hold a part of the cache."""
        sizes = rows, chunk_tokens, step_tokens, history_tokens
        own = self._own.cache_memory_bytes(*sizes)
        answers = self._channel.ask(to_message(MeasureMemory(*sizes)), _ANSWER_S)
        others = [answer["bytes"] for answer in answers if isinstance(answer["bytes"], int)]
        return None if own is None else min([own, *others])

    def allocate_cache(self, num_pages: int, storage: Storage) -> Cache:
        """See `Executor.allocate_cache`; the cache itself stays where it is."""
        self._start(AllocateCache(num_pages, storage))
        return NO_CACHE

    def _encode_images(self, pixels: Float[np.ndarray, "images 3 S S"]) -> Float[Array, "images tokens D"]:
        return self._start(EncodeImages(pixels)).result()  # type: ignore[return-value]

    def prefill(self, cache: Cache, batch: PrefillBatch) -> tuple[Cache, Started[ExpertTokens]]:
        """See `Executor.prefill`."""
        return NO_CACHE, self._start(Prefill(batch))  # type: ignore[return-value]

    def decode(self, cache: Cache, call: DecodeCall) -> tuple[Cache, Started[Report]]:
        """See `Executor.decode`."""
        return NO_CACHE, self._start(Decode(call))  # type: ignore[return-value]

    def copy_pages(self, cache: Cache, sources: Sequence[int], targets: Sequence[int]) -> Cache:
        """See `Executor.copy_pages`."""
        self._start(CopyPages(page_numbers(sources), page_numbers(targets)))
        return NO_CACHE

    def wait(self, cache: Cache) -> Cache:
        """See `Executor.wait`: calls end in their order."""
        if self._last is not None:
            self._last.result()
        return cache

    def _start(self, call: Call) -> Started[object]:
        """Sends a call and queues this process's part: one thread at a time, so that the order is the same on all ranks."""
        sizes = sizes_of(call)
        job = _Job(call)
        with self._lock:
            self._waiting.add(job)
        self._channel.send(to_message(call), None if sizes is None else to_message(sizes))
        self._jobs.put(job)
        self._last = _Awaited(job.future)
        return self._last

    def _run_jobs(self) -> None:
        """The thread's loop. If the next call is already there, it is dispatched before the last one is waited for."""
        last: _Job | None = None
        job: _Job | None = None
        while True:
            try:
                if last is not None and last.is_ready:
                    self._finish(last)
                    last = None
                job = self._next_job(last)
                if job is None and last is None:
                    return
                if job is not None:
                    job.number = self._beacon.enter(job.call.place)
                    job.outcome = self._worker.run(job.call)
                    self.compile_s = self._own.compile_s
                if last is not None:
                    self._finish(last)
                last = job
            except Exception as error:
                # Others may be in the middle of it: no call can follow.
                failed = job or last
                place = "a call" if failed is None else failed.call.place
                self._channel.suspect(
                    f"rank 0 failed in {place}: {type(error).__name__}: {' '.join(str(error).split())}"
                )
                return

    def _next_job(self, last: _Job | None) -> _Job | None:
        """The next call; None if none has arrived while the last one runs, or no more will come."""
        if last is None:
            return self._jobs.get()
        # A decode call usually follows a chunk, and is dispatched while that is computed.
        slices = _FOLLOW_SLICES if isinstance(last.call, Prefill) else 1
        for _ in range(slices):
            with contextlib.suppress(queue.Empty):
                job = self._jobs.get(timeout=FOLLOW_S / slices) if slices > 1 else self._jobs.get_nowait()
                if job is None:
                    # For once the last one has ended.
                    self._jobs.put(None)
                return job
            if last.is_ready:
                return None
        return None

    def _finish(self, job: _Job) -> None:
        result = job.outcome.result() if isinstance(job.outcome, Started) and job.has_result else None
        if isinstance(job.outcome, Started) and not job.has_result:
            job.outcome.wait()
        self._beacon.leave(job.number)
        with self._lock:
            self._waiting.discard(job)
        job.set(result)

    def _end_waits(self, failure: RunLostError) -> None:
        self._is_lost = True
        with self._lock:
            waiting, self._waiting = self._waiting, set()
        for job in waiting:
            job.fail(failure)


class _Job:
    """A call, and the outcome of this process's part of it."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.outcome: object = None
        self.number = 0
        self.future: concurrent.futures.Future[object] = concurrent.futures.Future()

    @property
    def has_result(self) -> bool:
        """Whether its values are needed on the host."""
        return isinstance(self.call, Prefill | Decode | EncodeImages)

    @property
    def is_ready(self) -> bool:
        """Whether all of it has finished."""
        return not isinstance(self.outcome, Started) or self.outcome.is_ready

    def set(self, result: object) -> None:
        """Its result, unless the run is lost first."""
        with contextlib.suppress(concurrent.futures.InvalidStateError):
            self.future.set_result(result)

    def fail(self, failure: RunLostError) -> None:
        """It has none."""
        with contextlib.suppress(concurrent.futures.InvalidStateError):
            self.future.set_exception(failure)


class _Awaited(Started[object]):
    """A call in the thread."""

    def __init__(self, future: concurrent.futures.Future[object]) -> None:
        self._future = future

    def result(self) -> object:
        """See `Started.result`."""
        return self._future.result()

    def wait(self) -> None:
        """See `Started.wait`."""
        self._future.result()
