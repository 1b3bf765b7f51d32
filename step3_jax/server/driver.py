"""The one thread that steps the engine, and how requests reach it and outputs get back to the event loop."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from step3_jax.engine.llm import LLM
from step3_jax.engine.request import Request, RequestOutput, SequenceOutput, StreamPiece
from step3_jax.server.error import unavailable

_LOG = logging.getLogger(__name__)
# Where several processes share a model, the loss of one while idle is noticed within this time.
_CHECK_S = 1.0
_LOST = "the engine has stopped: the server is shutting down, and no longer answers"


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that happened to a request.

    Attributes:
      piece: New output of a completion; None if there is none.
      output: The whole output once all completions have ended.
      num_cached_tokens: Prompt tokens that came from the prefix cache.
      time_s: When it was generated, on `time.monotonic`.
      admitted_s: When the request got a slot, on the same clock; None before.
      error: Why the request ended without an output.
    """

    piece: StreamPiece | None = None
    output: RequestOutput | None = None
    num_cached_tokens: int = 0
    time_s: float = 0.0
    admitted_s: float | None = None
    error: str | None = None

    @property
    def is_last(self) -> bool:
        """Whether it is the last one."""
        return self.output is not None or self.error is not None


class StepRecord(NamedTuple):
    """How a step of the engine went.

    Attributes:
      seconds: Time it took.
      num_tokens: Tokens it prefilled or generated.
      num_decode_steps: Steps of its decode call; 0 if it made none.
    """

    seconds: float
    num_tokens: int
    num_decode_steps: int


class Subscription:
    """Events of one request, for one reader in the event loop.

    Attributes:
      request: The request.
      log_id: Its id in the log.
      is_over: Whether no event follows.
    """

    def __init__(self, request: Request, driver: Driver, on_event: Callable[[Event], None], log_id: str) -> None:
        """Starts without events.

        Args:
          request: The request.
          driver: The driver that runs it.
          on_event: Called with each event, in the event loop.
          log_id: Its id in the log.
        """
        self.request = request
        self.log_id = log_id
        self._driver = driver
        self._on_event = on_event
        self.is_over = False

    def push(self, event: Event) -> None:
        """Takes an event, in the event loop."""
        if not self.is_over:
            self.is_over = event.is_last
            self._on_event(event)

    def close(self) -> None:
        """Ends the request if it is still running; no event follows. May be called at any time, repeatedly."""
        if not self.is_over:
            self.is_over = True
            self._driver.abort(self.request.request_id)


class Driver:
    """Steps an engine in its own thread as long as there is work.

    Attributes:
      is_dead: Whether the thread has died from an error.
    """

    def __init__(
        self,
        llm: LLM,
        loop: asyncio.AbstractEventLoop,
        *,
        max_waiting: int,
        on_death: Callable[[], None],
        on_step: Callable[[StepRecord], None] = lambda record: None,
        on_refused: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """Takes an engine, of which it is the only stepper.

        Args:
          llm: The model.
          loop: The event loop that receives the events.
          max_waiting: Most requests that the thread has not seen yet.
          on_death: Called in the event loop if the thread dies from an error.
          on_step: Called in the thread after each step.
          on_refused: Called in the event loop with the reason why a request was refused.
        """
        self.is_dead = False
        self._core = llm.core
        self._processor = llm.new_processor()
        self._loop = loop
        self._max_waiting = max_waiting
        self._on_death, self._on_step, self._on_refused = on_death, on_step, on_refused
        self._given: collections.deque[Subscription] = collections.deque()
        self._aborted: collections.deque[str] = collections.deque()
        self._wake = threading.Event()
        self._is_stopping = False
        # Used only by the thread.
        self._subscriptions: dict[str, Subscription] = {}
        self._outbox: list[tuple[Subscription, Event]] = []
        self._progress_s = time.monotonic()
        self._is_busy = False
        self._num_traced = 0
        self._thread = threading.Thread(target=self._run, name="step3-engine", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def submit(self, request: Request, on_event: Callable[[Event], None], log_id: str) -> Subscription:
        """Submits a request, from the event loop.

        Args:
          request: A checked request.
          on_event: Called with its events, in the event loop.
          log_id: The `X-Request-Id` that it belongs to.

        Raises:
          ApiError: 503, if too many wait to be seen or the thread has ended.
        """
        if self.is_dead:
            raise unavailable("engine_dead", _LOST)
        if len(self._given) >= self._max_waiting:
            self._on_refused("queue_full")
            raise unavailable("queue_full", "too many requests wait for the engine: try again a little later")
        subscription = Subscription(request, self, on_event, log_id)
        self._given.append(subscription)
        self._wake.set()
        return subscription

    def abort(self, request_id: str) -> None:
        """Ends a request with the next step, from any thread; does nothing if it has ended."""
        self._aborted.append(request_id)
        self._wake.set()

    def stop(self, timeout_s: float | None = None) -> bool:
        """Ends the thread after its current step, from another thread; returns whether it has ended in time."""
        self._is_stopping = True
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def is_stalled(self, seconds: float) -> bool:
        """Whether there has been work for this long without a token or a chunk, except while a program is compiled."""
        is_compiling = self._core.num_traced != self._num_traced
        return self._is_busy and not is_compiling and time.monotonic() - self._progress_s > seconds

    def _run(self) -> None:
        try:
            while not self._is_stopping:
                self._take_given()
                if self._core.has_work:
                    self._step()
                else:
                    self._is_busy = False
                    self._wake.wait(_CHECK_S)
                    self._core.check_executor()
                self._deliver()
        except BaseException as error:
            # BaseException too: a server must not continue without its engine.
            _LOG.critical("the engine's thread has ended", exc_info=error)
            self._die()

    def _step(self) -> None:
        stats = self._core.stats
        start, num_tokens, compile_s = time.monotonic(), stats.num_generated_tokens, stats.compile_s
        num_steps, num_prefilled = stats.num_decode_steps, stats.num_prefilled_tokens
        self._num_traced = self._core.num_traced
        if not self._is_busy:
            self._is_busy, self._progress_s = True, start
        before = self._count_computed()
        self._core.step()
        now = time.monotonic()
        new = stats.num_generated_tokens - num_tokens
        # Compiling takes minutes and is not a stall.
        if new or self._count_computed() != before or stats.compile_s != compile_s:
            self._progress_s = now
        num_tokens = new + stats.num_prefilled_tokens - num_prefilled
        self._on_step(StepRecord(now - start, num_tokens, stats.num_decode_steps - num_steps))

    def _count_computed(self) -> int:
        return sum(sequence.num_computed for sequence in self._core.scheduler.running)

    def _take_given(self) -> None:
        self._wake.clear()
        while self._given:
            given = self._given.popleft()
            # Otherwise its abort may have been taken already.
            if not given.is_over:
                self._add(given)
        while self._aborted:
            request_id = self._aborted.popleft()
            if self._subscriptions.pop(request_id, None) is not None:
                self._core.abort(request_id)

    def _add(self, subscription: Subscription) -> None:
        request = subscription.request
        try:
            self._processor.check(request)
            self._core.add(request, _Sink(self._take_output))
        except ValueError as error:
            self._outbox.append((subscription, Event(error=str(error))))
            return
        self._processor.add(request)
        self._subscriptions[request.request_id] = subscription

    def _take_output(self, output: SequenceOutput) -> None:
        """Turns the core's tokens into text, in the thread, while the next call runs."""
        subscription = self._subscriptions.get(output.request_id)
        try:
            piece, must_abort = self._processor.push(output)
            if must_abort:
                self._core.abort(output.request_id, output.index)
            whole = None
            if piece is not None and piece.finish_reason is not None:
                whole = self._processor.take(output.request_id)
            event = Event(piece, whole, output.num_cached_tokens, time.monotonic(), output.admitted_s)
        except Exception:
            # The error concerns only this request; the core must not see it.
            # After the first one nothing waits for it any more.
            if subscription is not None:
                _LOG.exception("the text of request %s could not be made", subscription.log_id)
            self._core.abort(output.request_id)
            event = Event(error="its text could not be made")
        if event.is_last:
            self._subscriptions.pop(output.request_id, None)
        if subscription is not None and (event.piece is not None or event.is_last):
            self._outbox.append((subscription, event))

    def _deliver(self) -> None:
        """One call into the event loop for all outputs of a step."""
        if self._outbox:
            outbox, self._outbox = self._outbox, []
            self._call(lambda: _push_all(outbox))

    def _die(self) -> None:
        self.is_dead = True
        waiting = [*self._subscriptions.values(), *self._given]
        outbox = [*self._outbox, *((one, Event(error=_LOST)) for one in waiting)]
        # First, so that clients learn what happened.
        self._call(self._on_death)
        self._call(lambda: _push_all(outbox))

    def _call(self, what: Callable[[], None]) -> None:
        # The loop may have ended before this thread.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(what)


@dataclasses.dataclass(frozen=True)
class _Sink:
    """Where the core puts a request's outputs."""

    put: Callable[[SequenceOutput], None]


def _push_all(events: list[tuple[Subscription, Event]]) -> None:
    for subscription, event in events:
        subscription.push(event)
