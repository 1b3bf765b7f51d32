"""Pareto fronts of cost against speed: deployments that no other of their kind beats in both."""

from __future__ import annotations

import numpy as np

from step3_jax.planner.query import MEMORY, Found
from step3_jax.planner.search import Search
from step3_jax.planner.stage import Numbers


def find_front(search: Search, *, is_apart: bool) -> list[Found]:
    """The front over all batches of all deployments considered, whatever the target.

    Args:
      search: The search.
      is_apart: Whether to return the front of attention and FFN on separate devices, or of devices that do both.

    Returns:
      Batches that fit, the fastest first: each one is slower and cheaper than the previous one.
    """
    batches = [one for one in search.batches if (one.candidate.topology is not None) == is_apart]
    if not batches:
        return []
    step_s = np.concatenate([one.step_s for one in batches])
    cost = np.concatenate([one.cost for one in batches])
    rows = np.concatenate([one.rows for one in batches])
    which = np.repeat(np.arange(len(batches)), [len(one.rows) for one in batches])
    while True:
        front = find_undominated(step_s, cost)
        fitting = np.ones(len(step_s), bool)
        for index in front:
            one = batches[which[index]]
            most = search.table.fit_rows(one.candidate, one.num_microbatches, int(rows[index]))
            fitting &= (which != which[index]) | (rows <= most) | (rows > rows[index])
            fitting[index] = most == rows[index]
        if fitting[front].all():
            break
        step_s, cost, rows, which = step_s[fitting], cost[fitting], rows[fitting], which[fitting]
    return [
        search.table.find(batches[which[one]].candidate, batches[which[one]].num_microbatches, int(rows[one]), MEMORY)
        for one in front
    ]


def find_undominated(step_s: Numbers, cost: Numbers) -> list[int]:
    """Indices of the points that no other point dominates, the fastest first.

    Equal points appear once.
    """
    order = np.lexsort((cost, step_s))
    least = np.minimum.accumulate(cost[order])
    is_better = np.concatenate([[True], least[1:] < least[:-1]])
    return [int(index) for index in order[is_better]]
