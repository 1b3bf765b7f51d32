"""Flows that share links."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from step3_jax.planner.simulation.link import SharedLinks
from tests.planner.simulation.flow_oracle import FlowLinks

SENDS = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 3), st.integers(0, 30)), min_size=1, max_size=20)


def run(links: SharedLinks, sends: list[tuple[float, int, float]]) -> dict[int, float]:
    """When each arrived, by its number."""
    waiting = sorted(enumerate(sends), key=lambda one: one[1][0])
    found: dict[int, float] = {}
    while waiting or links.next_s < math.inf:
        if waiting and waiting[0][1][0] <= links.next_s:
            number, (now_s, source, size) = waiting.pop(0)
            links.start(now_s, source, size, number)
            continue
        now_s = links.next_s
        found |= {one.tag: now_s for one in links.take()}
    return found


def run_oracle(links: FlowLinks, sends: list[tuple[float, int, float]], num_targets: int) -> dict[int, float]:
    """The same, each flow by itself."""
    waiting = sorted(enumerate(sends), key=lambda one: one[1][0])
    found: dict[int, float] = {}
    now_s = 0.0
    while waiting or links.is_stale or links.next_s < math.inf:
        if waiting and (waiting[0][1][0] <= now_s or (not links.is_stale and waiting[0][1][0] <= links.next_s)):
            number, (now_s, source, size) = waiting.pop(0)
            for target in range(num_targets):
                links.start(now_s, source, target, size, number)
            continue
        if links.is_stale:
            links.refresh(now_s)
            continue
        now_s = links.next_s
        for flow in links.take():
            found[flow.tag] = now_s
    return found


@settings(max_examples=100, deadline=None)
@given(SENDS, st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_all_flows_of_a_source_end_when_each_for_itself_would(
    sends: list[tuple[int, int, int]], num_targets: int, source_rate: int, target_rate: int
) -> None:
    floats = [(float(time), source, float(size)) for time, source, size in sends]
    found = run(SharedLinks(4, num_targets, source_rate, target_rate), floats)
    oracle = run_oracle(FlowLinks(4, num_targets, source_rate, target_rate), floats, num_targets)
    assert found == pytest.approx(oracle, rel=1e-9, abs=1e-9)


def test_two_sources_to_one_target_have_half_of_its_link_each() -> None:
    assert run(SharedLinks(2, 1, 1.0, 1.0), [(0.0, 0, 3.0), (0.0, 1, 3.0)]) == {0: 6.0, 1: 6.0}
    # Alone for a second, together until the first ends, then alone again.
    assert run(SharedLinks(2, 1, 1.0, 1.0), [(0.0, 0, 3.0), (1.0, 1, 3.0)]) == {0: 5.0, 1: 6.0}


def test_one_source_to_two_targets_divides_its_own_link_and_sends_in_turn() -> None:
    links = SharedLinks(2, 2, 1.0, 10.0)
    assert run(links, [(0.0, 0, 1.0), (0.5, 0, 1.0)]) == {0: 2.0, 1: 4.0}
    assert links.source_busy_s == [4.0, 0.0]
    assert links.busy_s == 4.0
    assert run(SharedLinks(1, 1, 2.0, 2.0), [(1.0, 0, 0.0)]) == {0: 1.0}
