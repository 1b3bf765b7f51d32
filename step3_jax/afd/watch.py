"""What is known of all ranks, and who is to blame when one fails. Pure: no clock, no network, no process.

The first to be heard of is often not the one that failed: who loses a peer dies of it, and may be quicker to tell.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

# From the first failure to the judgement, so that its cause is heard of too.
SETTLE_S = 1.0
# A rank that has not moved for so long when another loses its peers is the one that they have lost.
_SUSPECT_S = 2.0
# The worker of rank 0 says first who has not come.
_START_SLACK_S = 15.0
# Deadlines that all ranks may be inside of calls without any of them coming forward: within it devices compile.
_STALL_DEADLINES = 5


class Report(NamedTuple):
    """What a supervisor says of its worker.

    Attributes:
      where: Place, step and last exchange, in words.
      changes: Grows whenever the worker comes forward.
      is_inside: Whether it is inside of a call that waits for others.
      step: Number of its step; -1 before the first.
      still_s: How long its process has not moved at all.
    """

    where: str = "in the start"
    changes: int = 0
    is_inside: bool = False
    step: int = -1
    still_s: float = 0.0


@dataclasses.dataclass(frozen=True)
class Failure:
    """One rank's end.

    Attributes:
      rank: Its number.
      text: What happened to it, as it follows its name.
      is_explained: Whether the worker has itself said what was wrong.
      is_consequence: Whether it may have ended because another did.
      is_sudden: Whether nothing can have caused it but itself.
    """

    rank: int
    text: str
    is_explained: bool = False
    is_consequence: bool = False
    is_sudden: bool = False


@dataclasses.dataclass
class _Rank:
    host: str = ""
    report: Report = dataclasses.field(default_factory=Report)
    heard_at: float = 0.0
    changed_at: float = 0.0
    has_come: bool = False
    has_ended: bool = False


class Watch:
    """The table of rank 0's supervisor. Times are seconds of `now_s`, which grows by `pass_time` alone."""

    def __init__(self, roles: Sequence[str], *, deadline_s: float, start_timeout_s: float) -> None:
        """Nobody has come yet.

        Args:
          roles: Of each rank, such as "ffn 0".
          deadline_s: Silence after which a supervisor counts as lost, and the longest wait for a rank that has ended.
          start_timeout_s: In which all are to come.
        """
        self.now_s = 0.0
        self._roles = list(roles)
        self._deadline_s = deadline_s
        self._start_timeout_s = start_timeout_s
        self._ranks = [_Rank() for _ in roles]
        self._failures: list[Failure] = []
        self._failed_at = 0.0

    def pass_time(self, seconds: float) -> None:
        """Lets time pass. Time in which the supervisor itself did not run is not to be counted."""
        self.now_s += seconds

    def name(self, rank: int) -> str:
        """A rank as messages call it: "ffn 0 (rank 1 on host b)"."""
        return name_rank(self._roles, rank, self._ranks[rank].host)

    def where(self, rank: int) -> str:
        """Where a rank was when it was last heard."""
        return self._ranks[rank].report.where

    def has_come(self, rank: int) -> bool:
        """Whether a rank's supervisor has been heard."""
        return self._ranks[rank].has_come

    def come(self, rank: int, host: str) -> None:
        """Notes that a supervisor is there."""
        found = self._ranks[rank]
        found.host, found.has_come = host, True
        found.heard_at = found.changed_at = self.now_s

    def hear(self, rank: int, report: Report) -> None:
        """Notes a report."""
        found = self._ranks[rank]
        if report.changes != found.report.changes:
            found.changed_at = self.now_s
        found.report, found.heard_at = report, self.now_s

    def end(self, rank: int) -> None:
        """Notes that a worker has ended with code 0."""
        self._ranks[rank].has_ended = True
        self._ranks[rank].changed_at = self.now_s

    def fail(self, failure: Failure) -> None:
        """Notes a failure."""
        if not self._failures:
            self._failed_at = self.now_s
        self._failures.append(failure)

    def is_over(self) -> bool:
        """Whether all workers have ended well."""
        return all(rank.has_ended for rank in self._ranks)

    def judge(self) -> Failure | None:
        """Who failed; None while nobody has, or its cause may still be heard of."""
        if self._failures:
            if any(failure.is_sudden for failure in self._failures) or self.now_s - self._failed_at >= SETTLE_S:
                return self._find_cause()
            return None
        return self._find_missing() or self._find_silent() or self._find_deserted() or self._find_stall()

    def _find_cause(self) -> Failure:
        found = min(self._failures, key=_blame)
        if found.is_consequence:
            if missing := self._missing():
                return Failure(missing[0], "was lost before its supervisor had been heard of")
            has_failed = {failure.rank for failure in self._failures}
            others = [rank for rank in self._running() if rank not in has_failed]
            still = {rank: self._still_s(rank) for rank in others}
            if others and max(still.values()) >= _SUSPECT_S:
                rank = max(others, key=lambda rank: still[rank])
                return Failure(rank, f"has not moved for {still[rank]:.0f} s (stopped?), {self.where(rank)}")
        return found

    def _find_missing(self) -> Failure | None:
        missing = self._missing()
        if not missing or self.now_s < self._start_timeout_s + _START_SLACK_S:
            return None
        return Failure(missing[0], f"has not come within {self._start_timeout_s:g} s")

    def _find_silent(self) -> Failure | None:
        for rank in self._running():
            silence_s = self.now_s - self._ranks[rank].heard_at
            if silence_s > self._deadline_s:
                text = f"has not been heard for {silence_s:.0f} s: its host, or the network to it, is gone; it was last"
                return Failure(rank, f"{text} {self.where(rank)}")
        return None

    def _find_deserted(self) -> Failure | None:
        """A rank that has ended as if all were done while another waits for it, or without rank 0 does nothing."""
        ended = [rank for rank, found in enumerate(self._ranks) if found.has_ended]
        if not ended:
            return None
        last_end = max(self._ranks[rank].changed_at for rank in ended)
        for rank in self._running():
            found = self._ranks[rank]
            waited_s = self.now_s - max(last_end, found.changed_at)
            if (found.report.is_inside or self._ranks[0].has_ended) and waited_s > self._deadline_s:
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
            if not found.report.is_inside or found.report.step < 0 or self.now_s - found.changed_at <= limit_s:
                return None
        # The one that is furthest behind.
        rank = min(running, key=lambda rank: self._ranks[rank].report.step)
        others = "; ".join(f"{self.name(other)} is {self.where(other)}" for other in running if other != rank)
        text = f"is {self.where(rank)} and no process has come forward for {limit_s:.0f} s ({others})"
        return Failure(rank, f"{text}. If the devices are only slow, raise --afd-deadline")

    def _missing(self) -> list[int]:
        return [rank for rank, found in enumerate(self._ranks) if not found.has_come]

    def _running(self) -> list[int]:
        return [rank for rank, found in enumerate(self._ranks) if found.has_come and not found.has_ended]

    def _still_s(self, rank: int) -> float:
        return max(self._ranks[rank].report.still_s, self.now_s - self._ranks[rank].heard_at)


def name_rank(roles: Sequence[str], rank: int, host: str) -> str:
    """A rank as messages call it; its host is left out where it is not known."""
    return f"{roles[rank]} (rank {rank}{f' on {host}' if host else ''})"


def _blame(failure: Failure) -> tuple[bool, bool]:
    return failure.is_consequence, not failure.is_sudden
