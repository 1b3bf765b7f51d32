"""Finds the deployment with the lowest decoding cost within a target time, among all that an inventory allows.

With a larger batch a step takes longer and a token costs less, so for each deployment the largest batch counts that meets
the target and fits the memory. That gives a bound on its cost immediately; in the order of the bounds, exact batches are
then found and checked by the rule of `step3 plan memory --no-compile`, until enough are found.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from step3_jax.layout.deployment import MAX_MICROBATCHES
from step3_jax.planner.batch import BatchTable
from step3_jax.planner.candidate import Candidate, list_candidates
from step3_jax.planner.query import FIRST_TOKEN_TARGET, MEMORY, TARGET, Found, Query
from step3_jax.planner.stage import Numbers

# Number of batches of each deployment to evaluate first.
_NUM_BATCHES = 40


@dataclasses.dataclass(frozen=True)
class Batches:
    """Some batches of a deployment, smallest first; memory is checked only by a bound.

    Attributes:
      candidate: The deployment.
      num_microbatches: Micro-batches in flight.
      rows: Sequences of a device in a micro-batch.
      step_s: Seconds per token.
      cost: Cost of a token, in the unit of `BatchTable.cost_rate`.
      most_s: Most seconds per token by both targets.
      limit: The target that determines it.
    """

    candidate: Candidate
    num_microbatches: int
    rows: Numbers
    step_s: Numbers
    cost: Numbers
    most_s: float
    limit: str

    def count_within(self) -> int:
        """How many of the batches meet the targets; they are the first ones."""
        return int(np.searchsorted(self.step_s, self.most_s, side="right"))


@dataclasses.dataclass(frozen=True)
class Answer:
    """The results of a search.

    Attributes:
      query: The query.
      best: The cheapest ones, each on different devices; empty if nothing meets the target.
      fewest: The one on the fewest devices; None if nothing meets the target.
      nearest: If nothing does, the fastest; None if nothing fits the memory.
      num_candidates: Number of deployments considered.
      obstacle: If nothing fits the memory, why the last one does not, and what would help.
    """

    query: Query
    best: Sequence[Found]
    fewest: Found | None
    nearest: Found | None
    num_candidates: int
    obstacle: Sequence[str] = ()


class Search:
    """A search over all candidates.

    Attributes:
      query: The query.
      table: Results for single batches.
      candidates: Deployments to consider.
      batches: Some batches of each.
    """

    def __init__(self, query: Query, only: Sequence[str] = ()) -> None:
        """Evaluates the batches of all candidates.

        Args:
          query: The query.
          only: Kinds ("afd", "ep", "tp") and names such as "2a2f" to consider; all if empty.
        """
        self.query, self.table = query, BatchTable(query)
        self.candidates = [
            one
            for one in list_candidates(self.table.config, query.pools)
            if not only or one.kind in only or one.name in only
        ]
        self.batches = [batches for one in self.candidates for batches in self._count_batches(one)]

    def answer(self, num_best: int) -> Answer:
        """Finds the cheapest deployments, and the one on the fewest devices."""
        best = list(itertools.islice(self._find_cheapest(self.batches), num_best))
        fewest = nearest = None
        obstacle: Sequence[str] = ()
        if best:
            fewest = self._find_fewest()
        else:
            nearest = self._find_fastest()
            obstacle = () if nearest is not None else self._find_obstacle()
        return Answer(self.query, best, fewest, nearest, len(self.candidates), obstacle)

    def _count_batches(self, candidate: Candidate) -> Iterator[Batches]:
        bound = self.table.bound_rows(candidate)
        if not bound:
            return
        counts = range(1, MAX_MICROBATCHES + 1) if candidate.topology is not None else range(1, 2)
        limits = [bound // count for count in counts]
        rows = np.unique([*np.geomspace(1, bound, _NUM_BATCHES).astype(int), *filter(None, limits)]).astype(float)
        stages = self.table.count_stages(candidate, rows, self.query.judge)
        rate = self.table.cost_rate(candidate)
        for count, limit in zip(counts, limits, strict=True):
            if limit:
                fitting = rows[rows <= limit]
                step_s = stages.step_seconds(count)[: len(fitting)]
                cost = rate * step_s / (fitting * (count * candidate.num_attention))
                most_s, which = self._find_most_seconds(candidate, count)
                yield Batches(candidate, count, fitting, step_s, cost, most_s, which)

    def _find_most_seconds(self, candidate: Candidate, num_microbatches: int) -> tuple[float, str]:
        """Most seconds per token by both targets, and which target determines it."""
        query = self.query
        if query.first_token_s is None:
            return query.target_s, TARGET
        chunks, chunk_s = self.table.prefill_seconds(candidate, num_microbatches, query.judge)
        # From `BatchTable.first_token_seconds`.
        most_s = query.first_token_s / chunks - chunk_s
        return (most_s, FIRST_TOKEN_TARGET) if most_s < query.target_s else (query.target_s, TARGET)

    def _find_cheapest(self, batches: Sequence[Batches]) -> Iterator[Found]:
        """Deployments that meet the target, each on different devices, cheapest first."""
        tickets = itertools.count()
        heap: list[tuple[float, int, Batches | Found]] = []
        for one in batches:
            within = one.count_within()
            if within:
                heapq.heappush(heap, (float(one.cost[min(within, len(one.cost) - 1)]), next(tickets), one))
        seen = set()
        while heap:
            _, _, entry = heapq.heappop(heap)
            key = (entry.candidate.name, entry.candidate.devices)
            if key in seen:
                continue
            if isinstance(entry, Found):
                seen.add(key)
                yield entry
                continue
            found = self._find_largest(entry)
            if found is not None:
                speed = found.speed(self.query.judge)
                cost = self.table.cost_rate(found.candidate) / speed.tokens_per_s
                heapq.heappush(heap, (cost, next(tickets), found))

    def _find_largest(self, batches: Batches) -> Found | None:
        """The largest batch that meets the target and fits, None if there is none."""
        candidate, count = batches.candidate, batches.num_microbatches
        within = batches.count_within()
        rows, limit = int(batches.rows[within - 1]), MEMORY
        if within < len(batches.rows):
            between = np.arange(rows, batches.rows[within])
            step_s = self.table.count_stages(candidate, between, self.query.judge).step_seconds(count)
            rows = int(between[max(int(np.searchsorted(step_s, batches.most_s, side="right")), 1) - 1])
            limit = batches.limit
        fitting = self.table.fit_rows(candidate, count, rows)
        if not fitting:
            return None
        return self.table.find(candidate, count, fitting, limit if fitting == rows else MEMORY)

    def _find_fewest(self) -> Found | None:
        by_size = sorted(self.batches, key=lambda one: one.candidate.num_devices)
        for _, same in itertools.groupby(by_size, key=lambda one: one.candidate.num_devices):
            found = next(self._find_cheapest(list(same)), None)
            if found is not None:
                return found
        return None

    def _find_fastest(self) -> Found | None:
        """The fastest deployment that fits: one sequence per device and micro-batch."""
        for one in sorted(self.batches, key=lambda one: one.step_s[0] - one.most_s):
            if self.table.fit_rows(one.candidate, one.num_microbatches, 1):
                return self.table.find(one.candidate, one.num_microbatches, 1, one.limit)
        return None

    def _find_obstacle(self) -> list[str]:
        """Why the largest deployment does not fit the memory, and what would help."""
        if not self.candidates:
            return []
        largest = max(self.candidates, key=lambda one: one.num_devices)
        plan = self.table.plan(largest, 1, 1, has_remedies=True)
        return [f"{largest.name} on {largest.devices}: {plan.problems[0]}", *plan.remedies] if plan.problems else []
