"""Limits how many requests are in progress: counted before any work on them, and released when they end."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self

from step3_jax.server.error import bad_request, unavailable


class Admission:
    """Counts requests that run or wait. Only for the event loop.

    Attributes:
      num_requests: Requests that were admitted and have not ended.
      num_completions: Their completions.
      num_tokens: Their prompt tokens.
      max_completions: Most completions at a time.
    """

    def __init__(
        self, max_completions: int, max_tokens: int | None, on_refused: Callable[[str], None] = lambda reason: None
    ) -> None:
        """Starts empty.

        Args:
          max_completions: Most completions at a time.
          max_tokens: Most prompt tokens at a time; None for no limit.
          on_refused: Called with the reason of each refusal.
        """
        self.num_requests = 0
        self.num_completions = 0
        self.num_tokens = 0
        self.max_completions = max_completions
        self._max_tokens = max_tokens
        self._on_refused = on_refused

    def enter(self) -> Ticket:
        """Admits a request, as one completion until more is known about it.

        Raises:
          ApiError: 503, if there are too many.
        """
        ticket = Ticket(self)
        ticket.add_completions(1)
        self.num_requests += 1
        return ticket

    def check(self, num_completions: int, num_tokens: int) -> None:
        """Raises ApiError 503 if this many more would be too many. A request alone is never refused for its tokens."""
        total = self.num_completions + num_completions
        if total > self.max_completions:
            self._on_refused("queue_full")
            raise unavailable(
                "queue_full",
                f"{self.num_completions} completions run or wait, and {num_completions} more are requested; at most "
                f"{self.max_completions} are allowed: try again a little later",
            )
        tokens = self.num_tokens + num_tokens
        if num_tokens and self.num_tokens and self._max_tokens is not None and tokens > self._max_tokens:
            self._on_refused("queue_tokens_full")
            raise unavailable(
                "queue_full",
                f"requests with {self.num_tokens} prompt tokens run or wait, and this one has {num_tokens}; at most "
                f"{self._max_tokens} are allowed: try again a little later",
            )


class Ticket:
    """One request's part of the counts; leaving it releases that part."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._num_completions = 0
        self._num_tokens = 0

    def add_completions(self, count: int) -> None:
        """Counts more completions. Raises ApiError: 503 if they are too many now, 400 if they always are."""
        if count:
            most = self._admission.max_completions
            if self._num_completions + count > most:
                # It would be refused at any time.
                raise bad_request(
                    f"{self._num_completions + count} completions are requested at once; at most {most} are allowed: "
                    "give a smaller n or fewer prompts",
                    "n",
                )
            self._admission.check(count, 0)
            self._admission.num_completions += count
            self._num_completions += count

    def add_tokens(self, count: int) -> None:
        """Counts prompt tokens. Raises ApiError 503 if they are too many."""
        self._admission.check(0, count)
        self._admission.num_tokens += count
        self._num_tokens += count

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._admission.num_requests -= 1
        self._admission.num_completions -= self._num_completions
        self._admission.num_tokens -= self._num_tokens
