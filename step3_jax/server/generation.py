"""What the engine does for one HTTP request: its prompts are handed over, and what comes is taken as it comes."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import functools
import logging
import time
import uuid
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from step3_jax.engine.request import Prompt, Request, StreamPiece
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
      request: As the engine has it.
      record: How it goes.
      subscription: Its events; None before it is handed over.
      last_s: When each completion last had tokens.
      finished: Finish reasons of the completions that have ended.
    """

    request: Request
    record: RequestRecord
    subscription: Subscription | None = None
    last_s: dict[int, float] = dataclasses.field(default_factory=dict)
    finished: dict[int, str] = dataclasses.field(default_factory=dict)


class Generation:
    """The engine's part of one HTTP request. To be used as a context: leaving it ends what goes on.

    Attributes:
      num_choices: Completions of all prompts.
      num_reasoning_tokens: To be counted by whoever reads the text.
    """

    def __init__(self, service: Service, prompts: Sequence[Prompt], plan: SamplingPlan, *, is_stream: bool) -> None:
        """Prepares requests; nothing is handed over yet.

        Args:
          service: Has the engine.
          prompts: The prompts.
          plan: How each is answered.
          is_stream: Whether pieces are wanted as they come.
        """
        self._service = service
        self._plan = plan
        self.num_choices = len(prompts) * plan.n
        self.num_reasoning_tokens = 0
        self._events: collections.deque[tuple[int, Event]] = collections.deque()
        self._wake = asyncio.Event()
        self._interrupt: Exception | None = None
        config, now = service.llm.engine_config, time.monotonic()
        timeout_s = service.config.request_timeout
        self._deadline_s = now + timeout_s if timeout_s else None
        seed = service.llm.draw_seed(plan.params)
        steps = {"steps_per_call": config.stream_interval} if is_stream else {}
        self._parts = [
            _Part(
                Request(uuid.uuid4().hex, prompt, plan.params, seed, must_fit=plan.must_fit, **steps),
                RequestRecord(now, len(prompt.token_ids), plan.n, plan.params.max_tokens if plan.must_fit else None),
            )
            for prompt in prompts
        ]

    @property
    def requests(self) -> list[Request]:
        """As the engine has them."""
        return [part.request for part in self._parts]

    @property
    def is_over(self) -> bool:
        """Whether all completions have ended."""
        return all(len(part.finished) == self._plan.params.n for part in self._parts)

    @property
    def records(self) -> list[RequestRecord]:
        """How the prompts' requests go."""
        return [part.record for part in self._parts]

    def start(self) -> None:
        """Hands the requests over.

        Raises:
          ApiError: 503, if the engine takes no more.
        """
        for place, part in enumerate(self._parts):
            part.subscription = self._service.driver.submit(part.request, functools.partial(self._push, place))

    def interrupt(self, error: Exception) -> None:
        """`take` raises this from now on: the client has left, or the server ends."""
        self._interrupt = self._interrupt or error
        self._wake.set()

    async def take(self, timeout_s: float | None = None) -> list[tuple[int, StreamPiece]]:
        """Waits for new output.

        Args:
          timeout_s: How long; None for as long as it takes.

        Returns:
          Each prompt's number with its new pieces; nothing when the time is over.

        Raises:
          ApiError: If a request failed.
          Exception: What it was interrupted with.
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
        # The token that ended it is no part of the text, but was generated.
        count += piece.finish_reason == "stop" and not isinstance(piece.stop_reason, str)
        record.num_generated_tokens += count * self._plan.num_copies
        if piece.finish_reason is not None:
            part.finished[piece.completion] = piece.finish_reason
        if piece.finish_reason == "error":
            raise self._fail(part, piece.error or "no reason is known")
        if piece.finish_reason == "abort":
            raise unavailable("shutting_down", "the server is shutting down, and ended the request")
        copies = range(self._plan.num_copies)
        return [(place, piece if not copy else dataclasses.replace(piece, completion=copy)) for copy in copies]

    def _end_by_deadline(self) -> list[tuple[int, StreamPiece]]:
        """Ends what goes on as if it had reached its length."""
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
        _LOG.info("a request has taken %g s and ends", self._service.config.request_timeout)
        return pieces

    def _fail(self, part: _Part, reason: str) -> ApiError:
        _LOG.error("request %s failed: %s", part.request.request_id, reason)
        for index in range(self._plan.params.n):
            part.finished.setdefault(index, "error")
        if self._service.lifecycle.is_dead:
            return unavailable("engine_dead", "the engine has stopped, and the server ends")
        return internal_error()
