"""The engine's work for one HTTP request: submits its prompts, and takes the outputs as they arrive."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from step3_jax.engine.request import Request, StreamPiece
from step3_jax.server.driver import Event, Subscription
from step3_jax.server.error import ApiError, internal_error, unavailable
from step3_jax.server.metric import RequestRecord
from step3_jax.server.protocol.common import CompletionTokensDetails, PromptTokensDetails, Usage
from step3_jax.server.sampling import SamplingPlan
from step3_jax.server.service import Service

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass
class _Part:
    """One prompt of a request.

    Attributes:
      request: The engine's request.
      record: Its times and counts.
      num_echoed: Tokens of each completion that belong to the prompt.
      subscription: Its events; None before it is submitted.
      last_s: When each completion last had tokens.
      num_tokens: Tokens of each completion so far.
      finished: Finish reasons of the completions that have ended.
    """

    request: Request
    record: RequestRecord
    num_echoed: int = 0
    subscription: Subscription | None = None
    last_s: dict[int, float] = dataclasses.field(default_factory=dict)
    num_tokens: dict[int, int] = dataclasses.field(default_factory=dict)
    finished: dict[int, str] = dataclasses.field(default_factory=dict)


class Generation:
    """The engine's part of one HTTP request. Use it as a context manager: leaving it ends unfinished work.

    Attributes:
      num_choices: Completions of all prompts.
      num_reasoning_tokens: Counted by the code that reads the text.
      log_id: The `X-Request-Id` of the request, for the log; known once it has started.
    """

    def __init__(
        self, service: Service, requests: Sequence[Request], plan: SamplingPlan, num_echoed: Sequence[int] | None = None
    ) -> None:
        """Takes requests; nothing is submitted yet.

        Args:
          service: Has the engine.
          requests: One for each prompt, checked.
          plan: How each is answered.
          num_echoed: For each, tokens at the start of its output that belong to its prompt; none if None.
        """
        self._service = service
        self._plan = plan
        self.num_choices = len(requests) * plan.n
        self.num_reasoning_tokens = 0
        self.log_id = ""
        self._events: collections.deque[tuple[int, Event]] = collections.deque()
        self._wake = asyncio.Event()
        self._interrupt: Exception | None = None
        now = time.monotonic()
        timeout_s = service.config.request_timeout
        self._deadline_s = now + timeout_s if timeout_s else None
        max_tokens = plan.params.max_tokens if plan.must_fit else None
        self._parts = [
            _Part(request, RequestRecord(now, len(request.prompt.token_ids) + echoed, plan.n, max_tokens), echoed)
            for request, echoed in zip(requests, num_echoed or [0] * len(requests), strict=True)
        ]

    @property
    def requests(self) -> list[Request]:
        """The engine's requests."""
        return [part.request for part in self._parts]

    @property
    def is_over(self) -> bool:
        """Whether all completions have ended."""
        return all(len(part.finished) == self._plan.params.n for part in self._parts)

    @property
    def records(self) -> list[RequestRecord]:
        """The records of the prompts' requests."""
        return [part.record for part in self._parts]

    def start(self, log_id: str) -> None:
        """Submits the requests.

        Args:
          log_id: The `X-Request-Id` of the request.

        Raises:
          ApiError: 503, if the engine takes no more requests.
        """
        self.log_id = log_id
        for place, part in enumerate(self._parts):
            push = functools.partial(self._push, place)
            part.subscription = self._service.driver.submit(part.request, push, log_id)

    def interrupt(self, error: Exception) -> None:
        """Makes `take` raise this from now on: the client has disconnected, or the server is shutting down."""
        self._interrupt = self._interrupt or error
        self._wake.set()

    async def take(self, timeout_s: float | None = None) -> list[tuple[int, StreamPiece]]:
        """Waits for new output.

        Args:
          timeout_s: How long; None for as long as it takes.

        Returns:
          Each prompt's number with its new pieces; empty on timeout.

        Raises:
          ApiError: If a request failed.
          Exception: The one it was interrupted with.
        """
        remaining = None if self._deadline_s is None else max(0.0, self._deadline_s - time.monotonic())
        wait_s = min((time_s for time_s in (timeout_s, remaining) if time_s is not None), default=None)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._wake.wait()
        if self._interrupt is not None:
            raise self._interrupt
        self._wake.clear()
        pieces: list[tuple[int, StreamPiece]] = []
        while self._events:
            place, event = self._events.popleft()
            pieces += self._take_event(place, event)
        if not pieces and self._deadline_s is not None and time.monotonic() >= self._deadline_s:
            pieces = self._end_by_deadline()
        return pieces

    def usage(self) -> Usage:
        """Tokens so far."""
        num_prompt = sum(part.record.num_prompt_tokens for part in self._parts)
        num_generated = sum(part.record.num_generated_tokens for part in self._parts)
        return Usage(
            prompt_tokens=num_prompt,
            completion_tokens=num_generated,
            total_tokens=num_prompt + num_generated,
            prompt_tokens_details=PromptTokensDetails(
                cached_tokens=sum(part.record.num_cached_tokens for part in self._parts)
            ),
            completion_tokens_details=CompletionTokensDetails(reasoning_tokens=self.num_reasoning_tokens),
        )

    def __enter__(self) -> Self:
        self._service.generations.add(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        now = time.monotonic()
        self._service.generations.discard(self)
        for part in self._parts:
            if part.subscription is None:
                continue
            part.subscription.close()
            for index in range(self._plan.params.n):
                part.finished.setdefault(index, "abort")
            copies = self._plan.num_copies
            part.record.finish_reasons = [reason for reason in part.finished.values() for _ in range(copies)]
            self._service.metrics.observe_request(part.record, now)

    def _push(self, place: int, event: Event) -> None:
        self._events.append((place, event))
        self._wake.set()

    def _take_event(self, place: int, event: Event) -> list[tuple[int, StreamPiece]]:
        part = self._parts[place]
        if event.error is not None:
            raise self._fail(part, event.error)
        piece = event.piece
        if piece is None:
            return []
        record, count = part.record, len(piece.token_ids)
        record.num_cached_tokens, record.admitted_s = event.num_cached_tokens, event.admitted_s
        if count:
            if record.first_token_s is None:
                record.first_token_s = event.time_s
            if piece.completion in part.last_s:
                self._service.metrics.observe_tokens(event.time_s - part.last_s[piece.completion], count)
            part.last_s[piece.completion] = record.last_token_s = event.time_s
        # The token that ended it is not part of the text, but was generated.
        count += piece.finish_reason == "stop" and not isinstance(piece.stop_reason, str)
        before = part.num_tokens.get(piece.completion, -part.num_echoed)
        part.num_tokens[piece.completion] = before + count
        record.num_generated_tokens += (max(0, before + count) - max(0, before)) * self._plan.num_copies
        if piece.finish_reason is not None:
            part.finished[piece.completion] = piece.finish_reason
        if piece.finish_reason == "error":
            raise self._fail(part, piece.error or "the reason is unknown")
        if piece.finish_reason == "abort":
            raise unavailable("shutting_down", "the server is shutting down, and ended the request")
        copies = range(self._plan.num_copies)
        return [(place, piece if not copy else dataclasses.replace(piece, completion=copy)) for copy in copies]

    def _end_by_deadline(self) -> list[tuple[int, StreamPiece]]:
        """Ends unfinished completions as if they had reached their length."""
        pieces = []
        for place, part in enumerate(self._parts):
            if part.subscription is not None:
                part.subscription.close()
            for index in range(self._plan.params.n):
                if index in part.finished:
                    continue
                part.finished[index] = "length"
                for copy in range(self._plan.num_copies):
                    pieces.append((place, StreamPiece(place, index + copy, "", (), "length")))
        _LOG.info("request %s has taken %g s and ends", self.log_id, self._service.config.request_timeout)
        return pieces

    def _fail(self, part: _Part, reason: str) -> ApiError:
        _LOG.error("request %s failed: %s", self.log_id, reason)
        for index in range(self._plan.params.n):
            part.finished.setdefault(index, "error")
        if self._service.lifecycle.is_dead:
            return unavailable("engine_dead", "the engine has stopped, and the server is shutting down")
        return internal_error()
