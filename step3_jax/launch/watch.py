"""The state of a run's ranks, and which one is to blame for a failure. Pure: no clock, no network, no process.

The first report is often not about the rank that failed: a rank that loses a peer dies of it, and may be reported earlier.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

# Another process failed, or none makes progress; the value of EX_TEMPFAIL, "try again".
LOST_PEER_CODE = 75
# From the first failure to the verdict, so that its cause is reported too.
SETTLE_S = 1.0
# A rank that has made no progress for this long when another loses its peers is the one that was lost.
_SUSPECT_S = 2.0
# Deadlines that all ranks may spend inside calls without any progress: a batch of a new size is compiled.
_STALL_DEADLINES = 10


class Report(NamedTuple):
    """A keeper's report on a rank.

    Attributes:
      where: Place and last call, in words.
      changes: Grows whenever the rank makes progress.
      is_inside: Whether it is inside a call that waits for others.
      is_repeated: Whether a call of that kind has returned before.
      call: Number of its last call; 0 before the first.
      still_s: How long its process has made no progress at all.
    """

    where: str = "at the start"
    changes: int = 0
    is_inside: bool = False
    is_repeated: bool = False
    call: int = 0
    still_s: float = 0.0


@dataclasses.dataclass(frozen=True)
class Failure:
    """One rank's end.

    Attributes:
      rank: Its number.
      text: What happened to it, to follow its name.
      code: The run's exit code if this is its cause.
      is_consequence: Whether it may have ended because another did.
    """

    rank: int
    text: str
    code: int = LOST_PEER_CODE
    is_consequence: bool = False


@dataclasses.dataclass
class _Rank:
    report: Report = dataclasses.field(default_factory=Report)
    heard_at: float = 0.0
    changed_at: float = 0.0
    has_ended: bool = False


class Watch:
    """A launcher's table of ranks. Times are seconds of `now_s`, which only `pass_time` advances."""

    def __init__(self, names: Mapping[int, str], *, deadline_s: float) -> None:
        """Starts when all ranks have been started.

        Args:
          names: Names in messages of the ranks that this launcher has started: "ffn 0 (rank 1 on host b)".
          deadline_s: The longest a rank may make no progress, and the longest wait for one that has ended.
        """
        self.now_s = 0.0
        self._names = dict(names)
        self._deadline_s = deadline_s
        self._ranks = {rank: _Rank() for rank in names}
        self._failures: list[Failure] = []
        self._failed_at = 0.0

    def pass_time(self, seconds: float) -> None:
        """Lets time pass. Time in which the launcher itself did not run must not be counted."""
        self.now_s += seconds

    def name(self, rank: int) -> str:
        """A rank's name in messages."""
        return self._names[rank]

    def where(self, rank: int) -> str:
        """Where a rank was at its last report."""
        return self._ranks[rank].report.where

    def is_inside(self, rank: int) -> bool:
        """Whether a rank was inside a call that waits for others at its last report."""
        return self._ranks[rank].report.is_inside

    def has_called(self) -> bool:
        """Whether some rank has made a call, so that requests may be lost."""
        return any(rank.report.call > 0 for rank in self._ranks.values())

    def hear(self, rank: int, report: Report) -> None:
        """Notes a report."""
        found = self._ranks[rank]
        if report.changes != found.report.changes:
            found.changed_at = self.now_s
        found.report, found.heard_at = report, self.now_s

    def end(self, rank: int) -> None:
        """Notes that a rank has ended with code 0."""
        self._ranks[rank].has_ended = True
        self._ranks[rank].changed_at = self.now_s

    def fail(self, failure: Failure) -> None:
        """Notes a failure."""
        if not self._failures:
            self._failed_at = self.now_s
        self._failures.append(failure)

    def has_failure(self) -> bool:
        """Whether some rank has failed, by itself or because of another."""
        return bool(self._failures)

    def judge(self) -> Failure | None:
        """Why the run must end; None if it need not, or if a failure's cause may still be reported."""
        if not self._failures:
            return self._find_still() or self._find_deserted() or self._find_stall()
        is_settled = self.now_s - self._failed_at >= SETTLE_S
        return self._find_cause() if is_settled or not all(one.is_consequence for one in self._failures) else None

    def _find_cause(self) -> Failure:
        # A rank that ended because of another knows of it, and may be quicker.
        found = min(self._failures, key=lambda failure: (failure.is_consequence, failure.code == LOST_PEER_CODE))
        if found.is_consequence:
            has_failed = {failure.rank for failure in self._failures}
            still = {rank: self._still_s(rank) for rank in self._running() if rank not in has_failed}
            if still and max(still.values()) >= _SUSPECT_S:
                rank = max(still, key=lambda rank: still[rank])
                return Failure(rank, f"has made no progress for {still[rank]:.0f} s (stopped?), {self.where(rank)}")
        return found

    def _find_still(self) -> Failure | None:
        for rank in self._running():
            still_s = self._ranks[rank].report.still_s
            if still_s > self._deadline_s:
                text = f"has made no progress for {still_s:.0f} s (stopped, or starved of CPU time), {self.where(rank)}"
                return Failure(rank, text)
        return None

    def _find_deserted(self) -> Failure | None:
        """A rank that has ended normally while another waits for it, or a worker that is left without rank 0."""
        ended = [rank for rank, found in self._ranks.items() if found.has_ended]
        if not ended:
            return None
        last_end = max(self._ranks[rank].changed_at for rank in ended)
        for rank in self._running():
            found = self._ranks[rank]
            waited_s = self.now_s - max(last_end, found.changed_at)
            is_left = found.report.is_inside or (0 in ended and found.report.call > 0)
            if is_left and waited_s > self._deadline_s:
                text = f"has ended normally (exit code 0), and for {waited_s:.0f} s {self.name(rank)} has waited for it"
                return Failure(ended[0], f"{text} {found.report.where}")
        return None

    def _find_stall(self) -> Failure | None:
        running = self._running()
        limit_s = _STALL_DEADLINES * self._deadline_s
        if len(running) < len(self._ranks) or not running:
            return None
        for rank in running:
            found = self._ranks[rank]
            is_waiting = found.report.is_inside and found.report.is_repeated
            if not is_waiting or self.now_s - found.changed_at <= limit_s:
                return None
        # The rank that is furthest behind.
        rank = min(running, key=lambda rank: self._ranks[rank].report.call)
        others = "; ".join(f"{self.name(other)} is {self.where(other)}" for other in running if other != rank)
        text = f"is {self.where(rank)}, and no rank has made progress for {limit_s:.0f} s ({others})"
        return Failure(rank, f"{text}. If the devices are merely slow, raise --rank-deadline")

    def _running(self) -> list[int]:
        return [rank for rank, found in self._ranks.items() if not found.has_ended]

    def _still_s(self, rank: int) -> float:
        found = self._ranks[rank]
        return max(found.report.still_s, self.now_s - found.heard_at)
