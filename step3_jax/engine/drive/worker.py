"""What runs calls in each process of a run, and the loop of the ranks above 0."""

from __future__ import annotations

import abc
import dataclasses

from step3_jax.beacon import Beacon
from step3_jax.cache.paged import Cache
from step3_jax.channel.worker import WorkerChannel
from step3_jax.engine.drive.call import (
    AllocateCache,
    Call,
    CopyPages,
    Decode,
    EncodeImages,
    MeasureMemory,
    Prefill,
    from_message,
)
from step3_jax.engine.executor import Executor, Started

# How long to wait after a chunk for the decode call that usually follows, to dispatch it while the chunk is computed.
FOLLOW_S = 0.005
# What a call returns: something that may still run, bytes of memory, or nothing to wait for.
Outcome = Started[object] | int | None


class Worker(abc.ABC):
    """Runs this process's part of each call, in the order of the calls.

    Attributes:
      takes_batches: Whether it needs the contents of a batch, or only its sizes (`PrefillSizes`, `DecodeSizes`).
    """

    takes_batches = True

    @property
    @abc.abstractmethod
    def num_processes(self) -> int:
        """Processes that run each call together."""

    @abc.abstractmethod
    def run(self, call: Call) -> Outcome:
        """Runs a call, or dispatches it.

        Raises:
          ValueError: If it is not for this worker.
        """


class CachedWorker(Worker):
    """A worker with an executor, whose cache it keeps between calls."""

    def __init__(self, executor: Executor) -> None:
        """Takes the executor; the cache is allocated by a call."""
        self.executor = executor
        self._cache: Cache | None = None

    @property
    def num_processes(self) -> int:
        """See `Worker.num_processes`."""
        return self.executor.num_processes

    def run(self, call: Call) -> Outcome:
        """See `Worker.run`."""
        executor = self.executor
        if isinstance(call, AllocateCache):
            # First: there may be no room for both.
            self._cache = None
            # Wait here: the next call consumes it, and what is consumed cannot be waited for.
            self._cache = executor.wait(executor.allocate_cache(call.num_pages, call.storage))
            return None
        if isinstance(call, MeasureMemory):
            return executor.cache_memory_bytes(*dataclasses.astuple(call))
        if isinstance(call, EncodeImages):
            return Started(executor.encode_images(call.pixels))
        if isinstance(call, Prefill):
            self._cache, prefilled = executor.prefill(self._take_cache(), call.batch)
            return prefilled
        if isinstance(call, Decode):
            self._cache, decoded = executor.decode(self._take_cache(), call.call)
            return decoded
        if isinstance(call, CopyPages):
            self._cache = executor.copy_pages(self._take_cache(), call.sources, call.targets)
            return None
        raise ValueError(f"{type(call).__name__} is not for a worker with a cache")

    def _take_cache(self) -> Cache:
        if self._cache is None:
            raise ValueError("there is no cache: allocate it first")
        cache, self._cache = self._cache, None
        return cache


def serve_calls(worker: Worker, channel: WorkerChannel) -> None:
    """Runs the calls of rank 0 until it says goodbye.

    If the next call is already there, it is dispatched before the last one is waited for, as on rank 0.

    Args:
      worker: Runs them.
      channel: Brings them. An error is reported there before it is raised.

    Raises:
      RunLostError: If rank 0 is lost.
      Exception: Whatever a call failed with.
    """
    beacon = Beacon.from_environment()
    place, started = "", None
    channel.ready(takes_batches=worker.takes_batches)
    while True:
        message = channel.receive()
        if message.kind == "goodbye":
            return
        try:
            call = from_message(message)
            place = call.place
            number = beacon.enter(place)
            outcome = worker.run(call)
            if isinstance(call, MeasureMemory):
                channel.answer({"bytes": outcome if isinstance(outcome, int) else None})
            elif isinstance(outcome, Started):
                started = outcome
            if started is not None and not channel.has_message(FOLLOW_S if isinstance(call, Prefill) else 0):
                started.wait()
                started = None
            beacon.leave(number)
        except Exception as error:
            channel.fail(place or message.kind, f"{type(error).__name__}: {' '.join(str(error).split())}")
            raise
