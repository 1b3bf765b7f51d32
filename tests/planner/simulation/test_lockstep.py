"""The ticks of executor `program`: equal to their closed forms where times are constant."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from step3_jax.layout.schedule import Schedule
from step3_jax.planner.simulation.closed_form import StageTimes, lockstep_tick_s, step_s
from step3_jax.planner.simulation.jitter import Draws, Jitter
from step3_jax.planner.simulation.lockstep import simulate_lockstep

SECONDS = st.floats(1e-6, 1e-2)
STAGES = st.builds(StageTimes, SECONDS, st.floats(0, 1e-2), SECONDS, st.floats(0, 1e-2))
quick = settings(max_examples=60, deadline=None)


@quick
@given(STAGES, st.integers(2, 6), st.integers(1, 4), st.booleans())
def test_constant_times_give_the_closed_form_of_a_tick(
    stages: StageTimes, num_layers: int, count: int, is_on_core: bool
) -> None:
    schedule = Schedule(num_layers, count)
    ends = simulate_lockstep(schedule, stages, 6, is_exchange_on_core=is_on_core).step_ends_s()
    tick_s = lockstep_tick_s(stages, count, is_exchange_on_core=is_on_core)
    assert ends[-2] - ends[-3] == pytest.approx(schedule.num_ticks * tick_s, rel=1e-9)


@quick
@given(SECONDS, SECONDS, st.floats(0, 1e-2), st.integers(2, 6))
def test_two_micro_batches_take_what_ai_dynamos_planner_says(
    attention_s: float, ffn_s: float, way_s: float, num_layers: int
) -> None:
    """max(t_A + t_A2F, t_F + t_F2A), where both directions take equally long: one exchange then carries both."""
    stages = StageTimes(attention_s, way_s, ffn_s, way_s)
    ends = simulate_lockstep(Schedule(num_layers, 2), stages, 4).step_ends_s()
    cycle_s = max(attention_s + way_s, ffn_s + way_s)
    assert ends[-2] - ends[-3] == pytest.approx(2 * num_layers * cycle_s, rel=1e-9)


@quick
@given(STAGES, st.integers(2, 6), st.integers(1, 4))
def test_going_in_step_is_never_faster_than_going_as_soon_as_possible(
    stages: StageTimes, num_layers: int, count: int
) -> None:
    ends = simulate_lockstep(Schedule(num_layers, count), stages, 6).step_ends_s()
    assert ends[-2] - ends[-3] >= step_s(stages, num_layers, count) * (1 - 1e-9)


def test_times_that_spread_make_every_tick_as_long_as_the_slower_side() -> None:
    spread = Jitter(samples=(1.0, 3.0))
    found = simulate_lockstep(
        Schedule(10, 2), StageTimes(2.0, 0.0, 2.0, 0.0), 100, draws=Draws({"attention": spread, "ffn": spread}, 3)
    )
    # The larger of two that are 1 or 3 with equal chance.
    assert found.end_s / 2000 == pytest.approx(2.5, rel=0.03)
    assert found.attention_busy_s[0] <= found.end_s


def test_heads_and_steps_are_counted() -> None:
    found = simulate_lockstep(Schedule(2, 2), StageTimes(1.0, 0.0, 1.0, 0.0), 3, head_s=0.5)
    assert found.attention_busy_s == [pytest.approx(3 * 2 * (2 * 1.0 + 0.5))]
    with pytest.raises(ValueError, match="0 steps"):
        simulate_lockstep(Schedule(2, 2), StageTimes(1.0, 0.0, 1.0, 0.0), 0)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_recorded_item_goes_through_all_lanes_in_turn(count: int) -> None:
    kept = simulate_lockstep(Schedule(3, count), StageTimes(1.0, 0.5, 1.2, 0.5), 3, is_recorded=True).events
    found = {(one.stage.lane, *one.stage[2:]): one for one in kept}
    assert len(found) == len(kept) == 4 * 3 * 3 * count
    for step in range(3):
        for layer in range(3):
            for index in range(count):
                lanes = [found[lane, step, layer, index] for lane in ("attention", "to_ffn", "ffn", "to_attention")]
                assert all(before.end_s <= after.start_s for before, after in itertools.pairwise(lanes))
                if layer:
                    assert found["to_attention", step, layer - 1, index].end_s <= lanes[0].start_s
