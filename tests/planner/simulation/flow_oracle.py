"""Flows on shared links, each by itself: `planner/simulation/link.py`, which joins those of a source, must agree.

Each instance has one link in each direction. Flows between the same two instances go one after the other, as on one
connection; flows between different ones run at the same time. Each end of a flow divides its bandwidth equally among the
flows that run there, and the flow goes at the smaller of its two shares.
"""

from __future__ import annotations

import collections
import math
from typing import NamedTuple

# Flows that end within this fraction of a time end together: they differ only by rounding.
_SAME = 1e-12


class Flow(NamedTuple):
    """A finished flow.

    Attributes:
      attention: Its attention instance.
      ffn: Its FFN instance.
      tag: What it carried.
      start_s: When its first byte went out.
    """

    attention: int
    ffn: int
    tag: int
    start_s: float


class FlowLinks:
    """The flows in one direction. Call `refresh` once everything that starts at a given time has been started.

    Attributes:
      next_s: When the next flow ends; infinite if there is none.
      is_stale: Whether flows came or went since the last `refresh`.
      busy_s: Time for which each attention instance's link has had a flow.
    """

    def __init__(self, num_attention: int, num_ffn: int, attention_bytes_s: float, ffn_bytes_s: float) -> None:
        """No flow yet.

        Args:
          num_attention: Attention instances.
          num_ffn: FFN instances.
          attention_bytes_s: Bandwidth of each attention instance's link.
          ffn_bytes_s: Bandwidth of each FFN instance's link.
        """
        self.next_s = math.inf
        self.is_stale = False
        self.busy_s = [0.0] * num_attention
        self._num_ffn = num_ffn
        self._attention_bytes_s, self._ffn_bytes_s = attention_bytes_s, ffn_bytes_s
        # Sizes and tags of the flows of each connection, the running one first.
        self._waiting: list[collections.deque[tuple[float, int]]] = [
            collections.deque() for _ in range(num_attention * num_ffn)
        ]
        # The connections that have a flow.
        self._left: dict[int, float] = {}
        self._rate: dict[int, float] = {}
        self._end: dict[int, float] = {}
        self._start: dict[int, float] = {}
        self._num_attention_flows = [0] * num_attention
        self._num_ffn_flows = [0] * num_ffn
        self._now_s = 0.0

    def start(self, now_s: float, attention: int, ffn: int, num_bytes: float, tag: int) -> None:
        """Starts a flow, or queues it behind those of the same connection."""
        path = attention * self._num_ffn + ffn
        waiting = self._waiting[path]
        waiting.append((num_bytes, tag))
        if len(waiting) == 1:
            self._settle(now_s)
            self._num_attention_flows[attention] += 1
            self._num_ffn_flows[ffn] += 1
            self._open(now_s, path)

    def take(self) -> list[Flow]:
        """Ends the flows that end at `next_s`."""
        now_s = self.next_s
        ended = [path for path, end in self._end.items() if end <= now_s + _SAME * abs(now_s)]
        self._settle(now_s)
        flows = []
        for path in ended:
            attention, ffn = divmod(path, self._num_ffn)
            _, tag = self._waiting[path].popleft()
            flows.append(Flow(attention, ffn, tag, self._start[path]))
            if self._waiting[path]:
                self._open(now_s, path)
                continue
            del self._left[path], self._rate[path], self._end[path]
            self._num_attention_flows[attention] -= 1
            self._num_ffn_flows[ffn] -= 1
        self.is_stale = True
        return flows

    def refresh(self, now_s: float) -> None:
        """Redistributes the bandwidth and finds the next end."""
        self._settle(now_s)
        next_s = math.inf
        for path, left in self._left.items():
            attention, ffn = divmod(path, self._num_ffn)
            rate = self._attention_bytes_s / self._num_attention_flows[attention]
            other = self._ffn_bytes_s / self._num_ffn_flows[ffn]
            if other < rate:
                rate = other
            self._rate[path] = rate
            self._end[path] = end = now_s + left / rate
            if end < next_s:
                next_s = end
        self.next_s, self.is_stale = next_s, False

    def _open(self, now_s: float, path: int) -> None:
        self._left[path], self._rate[path], self._end[path] = self._waiting[path][0][0], 0.0, math.inf
        self._start[path] = now_s
        self.is_stale = True

    def _settle(self, now_s: float) -> None:
        """Subtracts what was sent since the last change."""
        passed = now_s - self._now_s
        if passed <= 0:
            return
        self._now_s = now_s
        for path, rate in self._rate.items():
            self._left[path] = max(0.0, self._left[path] - rate * passed)
        for one, count in enumerate(self._num_attention_flows):
            if count:
                self.busy_s[one] += passed
