"""Links whose bandwidth is shared by the flows on them.

Each instance has one link in each direction. An instance sends its part of a micro-batch as flows of equal size to all
instances of the other side, which start together. The next ones wait for them, as on one connection; flows from
different instances run concurrently. Each end of a flow divides its bandwidth equally among its flows, and a flow runs
at the smaller of its two shares.

As a source's flows go to all targets, every target has as many flows as there are active sources, and all flows have the
same rate at a time. So the flows of a source end together, and the source with the least left ends first.
"""

from __future__ import annotations

import collections
import math
from typing import NamedTuple

# Flows that end within this fraction of a time end together: they differ only by rounding.
_SAME = 1e-12


class Sent(NamedTuple):
    """Flows of one source that have ended.

    Attributes:
      source: Its instance.
      tag: What they carried.
      start_s: When their first bytes were sent.
    """

    source: int
    tag: int
    start_s: float


class SharedLinks:
    """The flows in one direction.

    Attributes:
      next_s: When the next flows end; infinite if there are none.
      source_busy_s: Time that each source has been sending.
      busy_s: Time that any source has.
    """

    def __init__(self, num_sources: int, num_targets: int, source_bytes_s: float, target_bytes_s: float) -> None:
        """Starts without flows.

        Args:
          num_sources: Instances of the side that sends.
          num_targets: Instances of the other side.
          source_bytes_s: Bandwidth of each source's link.
          target_bytes_s: Bandwidth of each target's link.
        """
        self.next_s = math.inf
        self.source_busy_s = [0.0] * num_sources
        self.busy_s = 0.0
        # Rate of a flow, by the number of active sources.
        self._rates = [source_bytes_s] + [
            min(source_bytes_s / num_targets, target_bytes_s / count) for count in range(1, num_sources + 1)
        ]
        # Bytes that an endless flow would have carried until `_now_s`.
        self._carried = 0.0
        self._now_s = 0.0
        # The value of that measure at which each active source ends; tag and start.
        self._ends: dict[int, float] = {}
        self._running: dict[int, tuple[int, float]] = {}
        self._waiting: list[collections.deque[tuple[float, int]]] = [collections.deque() for _ in range(num_sources)]

    def start(self, now_s: float, source: int, num_bytes: float, tag: int) -> None:
        """Starts a source's flows, each of `num_bytes`, or queues them after its current ones."""
        if source in self._ends:
            self._waiting[source].append((num_bytes, tag))
            return
        self._advance(now_s)
        self._ends[source] = self._carried + num_bytes
        self._running[source] = tag, now_s
        self._find_next()

    def take(self) -> list[Sent]:
        """Ends the flows that end at `next_s`."""
        now_s = self.next_s
        self._advance(now_s)
        # A rounding of the time: otherwise flows that end together would be separate.
        least = self._carried + self._rates[len(self._ends)] * _SAME * abs(now_s)
        ended = [source for source, end in self._ends.items() if end <= least]
        taken = []
        for source in ended:
            tag, start_s = self._running[source]
            self.source_busy_s[source] += now_s - start_s
            taken.append(Sent(source, tag, start_s))
            if self._waiting[source]:
                num_bytes, tag = self._waiting[source].popleft()
                self._ends[source] = self._carried + num_bytes
                self._running[source] = tag, now_s
            else:
                del self._ends[source], self._running[source]
        if not self._ends:
            # Kept small, so that it does not lose digits.
            self._carried = 0.0
        self._find_next()
        return taken

    def _advance(self, now_s: float) -> None:
        passed = now_s - self._now_s
        self._now_s = now_s
        if self._ends:
            self._carried += passed * self._rates[len(self._ends)]
            self.busy_s += passed

    def _find_next(self) -> None:
        if self._ends:
            left = min(self._ends.values()) - self._carried
            self.next_s = self._now_s + (left / self._rates[len(self._ends)] if left > 0 else 0.0)
        else:
            self.next_s = math.inf
