"""The engine's scheduler with page counts instead of pages: which requests get a slot, are prefilled, lose their pages.

The rules are those of `engine/scheduler.py`, partly the same functions (`layout/admission.py`); a test compares the
two. There is no prefix cache here, as lengths do not say which prompts share a prefix, and a request has one completion.
"""

from __future__ import annotations

import collections
import dataclasses

from step3_jax.layout.admission import (
    MAX_PASSES,
    MAX_PREEMPTIONS,
    Unfinished,
    count_admitted_pages,
    count_growth,
    count_room,
    divide_chunk,
)
from step3_jax.layout.page import PAGE_SIZE


@dataclasses.dataclass(eq=False)
class Request:
    """A request in the system.

    Attributes:
      number: Its number among all.
      arrival_s: When it arrived.
      num_prompt: Tokens of its prompt.
      num_output: Tokens that it will generate.
      num_tokens: Prompt and output so far.
      num_computed: Tokens in the cache.
      num_pages: Its pages.
      shard: Shard of its pages and slot; None while it waits.
      num_preemptions: How often it lost its pages.
      num_passed: How often a later one was admitted before it.
      admitted_s: When it first got a slot.
      first_s: When its first token was delivered.
      end_s: When its last one was.
    """

    number: int
    arrival_s: float
    num_prompt: int
    num_output: int
    num_tokens: int = 0
    num_computed: int = 0
    num_pages: int = 0
    shard: int | None = None
    num_preemptions: int = 0
    num_passed: int = 0
    admitted_s: float | None = None
    first_s: float | None = None
    end_s: float | None = None

    def __post_init__(self) -> None:
        self.num_tokens = self.num_tokens or self.num_prompt

    @property
    def num_generated(self) -> int:
        """Tokens generated so far."""
        return self.num_tokens - self.num_prompt

    @property
    def max_cached(self) -> int:
        """The most tokens it can ever have in the cache: the last one is never written."""
        return self.num_prompt + self.num_output - 1

    @property
    def num_to_prefill(self) -> int:
        """Tokens still to prefill; the last one is left to the decode step."""
        return self.num_tokens - 1 - self.num_computed

    @property
    def is_ready(self) -> bool:
        """Whether its next token can be decoded."""
        return self.shard is not None and not self.num_to_prefill

    @property
    def is_pinned(self) -> bool:
        """Whether it was preempted so often that it now keeps its pages."""
        return self.num_preemptions >= MAX_PREEMPTIONS


class Scheduler:
    """Slots, pages and a queue.

    Attributes:
      running: Requests in slots, in the order of admission.
      max_num_seqs: Slots of each shard.
      max_num_batched_tokens: Prompt tokens that each prefills at once.
      num_preemptions: Requests that lost their pages so far.
      num_rejected: Requests for which the queue had no room.
    """

    def __init__(
        self,
        *,
        num_shards: int,
        shard_pages: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        long_prefill_tokens: int | None = None,
        max_queued: int | None = None,
        has_prefill: bool = True,
    ) -> None:
        """Starts with nothing to do.

        Args:
          num_shards: Shards of the cache: attention devices.
          shard_pages: Pages of each.
          max_num_seqs: Slots of each.
          max_num_batched_tokens: Prompt tokens that each prefills at once.
          long_prefill_tokens: Most of those for one request while others wait; half of them if None.
          max_queued: Requests that may run or wait; more are rejected. None for no limit.
          has_prefill: Whether prompts are prefilled here; else they arrive with their cache.

        Raises:
          ValueError: If a number is below 1.
        """
        for name, value in (
            ("shards", num_shards),
            ("pages per shard", shard_pages),
            ("slots per shard", max_num_seqs),
            ("prompt tokens at once", max_num_batched_tokens),
            ("requests that run or wait", 1 if max_queued is None else max_queued),
        ):
            if value < 1:
                raise ValueError(f"{value} {name}; at least 1 is needed")
        self.running: list[Request] = []
        self.num_preemptions = 0
        self.num_rejected = 0
        self._num_shards, self._shard_pages, self.max_num_seqs = num_shards, shard_pages, max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self._long_prefill_tokens = long_prefill_tokens or max(1, max_num_batched_tokens // 2)
        self._max_queued = max_queued
        self._has_prefill = has_prefill
        self._waiting: collections.deque[Request] = collections.deque()
        self._free = [shard_pages] * num_shards
        self._num_in_shard = [0] * num_shards

    @property
    def shard_tokens(self) -> int:
        """Tokens that a shard's cache holds."""
        return self._shard_pages * PAGE_SIZE

    @property
    def num_waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    @property
    def is_prefilling(self) -> bool:
        """Whether a request in a slot has tokens to prefill."""
        return any(one.num_to_prefill for one in self.running)

    def add(self, request: Request) -> bool:
        """Puts a request at the end of the queue; False if there is no room for it."""
        if self._max_queued is not None and len(self.running) + len(self._waiting) >= self._max_queued:
            self.num_rejected += 1
            return False
        self._waiting.append(request)
        return True

    def admit(self, now_s: float) -> None:
        """Gives slots and pages to queued requests, as far as they go."""
        blocked: list[Request] = []
        for request in tuple(self._waiting):
            if min(self._num_in_shard) >= self.max_num_seqs:
                break
            if len(blocked) > MAX_PASSES or any(other.num_passed >= MAX_PASSES for other in blocked):
                break
            if not self._take_pages(request):
                blocked.append(request)
                continue
            for other in blocked:
                other.num_passed += 1
            if request.admitted_s is None:
                request.admitted_s = now_s
            self._waiting.remove(request)
            self.running.append(request)

    def plan_chunk(self) -> list[tuple[Request, int]]:
        """Requests to prefill next, and how many tokens of each."""
        unfinished = [one for one in self.running if one.num_to_prefill]
        counts = divide_chunk(
            [Unfinished(one.num_computed, one.num_to_prefill, one.shard or 0) for one in unfinished],
            num_shards=self._num_shards,
            max_num_batched_tokens=self.max_num_batched_tokens,
            long_prefill_tokens=self._long_prefill_tokens,
        )
        return [(one, count) for one, count in zip(unfinished, counts, strict=True) if count]

    def make_room(self, num_steps: int) -> tuple[int, list[Request]]:
        """Gives pages to the decoding requests, and preempts others if pages run out.

        Returns:
          How many steps there is room for, and requests that fill a shard's cache alone and cannot continue.
        """
        stuck = []
        for request in tuple(self.running):
            while request.is_ready:
                room = self._grow(request, num_steps)
                if room > 0:
                    num_steps = min(num_steps, room)
                    break
                if not self._reclaim(request.shard or 0):
                    stuck.append(request)
                    break
        return num_steps, stuck

    def release(self, request: Request) -> None:
        """Removes a running request from its slot and frees its pages."""
        shard = request.shard
        if shard is None:
            return
        self.running.remove(request)
        self._free[shard] += request.num_pages
        self._num_in_shard[shard] -= 1
        request.num_pages, request.shard = 0, None

    def _take_pages(self, request: Request) -> bool:
        count = count_admitted_pages(
            request.num_tokens, request.max_cached, is_pinned=request.is_pinned, shard_pages=self._shard_pages
        )
        open_shards = [one for one in range(self._num_shards) if self._num_in_shard[one] < self.max_num_seqs]
        # The one with the fewest requests, and among equals the one with the most pages.
        for shard in sorted(open_shards, key=lambda one: (self._num_in_shard[one], -self._free[one], one)):
            if count <= self._free[shard]:
                self._free[shard] -= count
                self._num_in_shard[shard] += 1
                request.num_pages, request.shard = count, shard
                request.num_computed = 0 if self._has_prefill else request.num_tokens - 1
                return True
        return False

    def _grow(self, request: Request, num_steps: int) -> int:
        shard = request.shard or 0
        tokens, most = request.num_tokens, request.max_cached
        count = count_growth(tokens, num_steps, most, num_pages=request.num_pages, num_free=self._free[shard])
        request.num_pages += count
        self._free[shard] -= count
        return count_room(tokens, num_steps, most, num_pages=request.num_pages)

    def _reclaim(self, shard: int) -> bool:
        """Frees pages of a shard by preempting the request with the fewest tokens; False if there is only one."""
        own = [one for one in self.running if one.shard == shard]
        if len(own) == 1:
            return False
        victim = min((one for one in reversed(own) if not one.is_pinned), key=lambda one: one.num_computed)
        victim.num_preemptions += 1
        self.num_preemptions += 1
        self.release(victim)
        victim.num_computed = 0
        self._waiting.appendleft(victim)
        return True
