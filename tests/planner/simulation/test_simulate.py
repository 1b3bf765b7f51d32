"""The simulated pipeline: equal to its closed forms where times are constant, and never faster than any of its lanes."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from step3_jax.planner.simulation.closed_form import (
    StageTimes,
    best_ratio,
    cycle_s,
    has_no_bubble,
    layer_s,
    speedup,
    stage_budget_s,
    step_s,
)
from step3_jax.planner.simulation.heap_loop import run_shared
from step3_jax.planner.simulation.jitter import Draws, Jitter
from step3_jax.planner.simulation.lane import Pipeline, Work, fold
from step3_jax.planner.simulation.order_loop import run_in_order
from step3_jax.planner.simulation.simulate import Run, simulate
from step3_jax.timeline.event import Lane
from tests.planner.simulation.event_oracle import run_textbook

SECONDS = st.floats(1e-6, 1e-2)
WAY_SECONDS = st.one_of(st.just(0.0), st.floats(1e-6, 1e-2))
STAGES = st.builds(
    StageTimes, SECONDS, WAY_SECONDS, SECONDS, WAY_SECONDS, st.one_of(st.just(0.0), st.floats(1e-7, 1e-3))
)
COUNTS = st.integers(1, 4)
LAYERS = st.integers(1, 9)
SPREAD = {lane: Jitter(0.3) for lane in ("attention", "to_ffn", "ffn", "to_attention")}
quick = settings(max_examples=60, deadline=None)


def run(stages: StageTimes, num_layers: int, count: int, num_steps: int = 4, head_s: float = 0.0, **sizes: int) -> Run:
    """Constant times, with the given transfer times."""
    pipeline = Pipeline(num_layers, count, latency_s=stages.latency_s, **sizes)
    work = Work.constant(
        pipeline,
        attention_s=stages.attention_s,
        ffn_s=stages.ffn_s,
        to_ffn=stages.to_ffn_s,
        to_attention=stages.to_attention_s,
        head_s=head_s,
    )
    return simulate(pipeline, work, num_steps)


def steady_step_s(found: Run) -> float:
    """Time of the last step but one: no layers follow the heads of the last one."""
    ends = found.step_ends_s()
    return ends[-2] - ends[-3]


@quick
@given(STAGES, LAYERS, COUNTS, st.integers(1, 3), st.integers(1, 3))
def test_constant_times_give_the_closed_form_of_a_step(
    stages: StageTimes, num_layers: int, count: int, num_attention: int, num_ffn: int
) -> None:
    """m stages of the lane that binds, or one micro-batch's round trip, whichever is longer: for all sizes."""
    found = run(stages, num_layers, count, num_attention=num_attention, num_ffn=num_ffn)
    assert steady_step_s(found) == pytest.approx(step_s(stages, num_layers, count), rel=1e-9)


@quick
@given(SECONDS, st.floats(0, 1), st.floats(0, 1), LAYERS, st.integers(2, 4))
def test_the_reports_rule_holds_where_its_condition_does(
    attention_s: float, ffn_part: float, way_part: float, num_layers: int, count: int
) -> None:
    """TPOT = L m max(t_A, t_F, t_comm), where t_A2F + t_F + t_F2A <= (m - 1) t_A: and attention is then never idle."""
    ffn_s = ffn_part * attention_s
    ways_s = way_part * ((count - 1) * attention_s - ffn_s) * (1 - 1e-9)
    stages = StageTimes(attention_s, min(ways_s / 2, attention_s), ffn_s, min(ways_s / 2, attention_s))
    assert has_no_bubble(stages, count)
    found = run(stages, num_layers, count, 5)
    assert steady_step_s(found) == pytest.approx(num_layers * count * stages.longest_s, rel=1e-9)
    assert found.attention_busy_s[0] == pytest.approx(5 * num_layers * count * attention_s, rel=1e-9)


@quick
@given(SECONDS, SECONDS, st.floats(0, 1), st.floats(0, 1), LAYERS, st.booleans())
def test_ai_dynamos_cycle_holds_where_both_ways_are_no_longer_than_a_side(
    attention_s: float, ffn_s: float, ways_part: float, there_part: float, num_layers: int, is_one_way: bool
) -> None:
    """Three micro-batches then satisfy its condition; where one direction takes no time the other may exceed a side."""
    longer_s = max(attention_s, ffn_s)
    if is_one_way:
        stages, count = StageTimes(attention_s, 2 * ways_part * longer_s, ffn_s, 0.0), 4
    else:
        there_s, back_s = ways_part * there_part * longer_s, ways_part * (1 - there_part) * longer_s
        stages, count = StageTimes(attention_s, there_s * (1 - 1e-9), ffn_s, back_s * (1 - 1e-9)), 3
    found = run(stages, num_layers, count)
    assert steady_step_s(found) == pytest.approx(num_layers * count * cycle_s(stages, count), rel=1e-9)
    alone = run(stages, num_layers, 1)
    assert steady_step_s(alone) == pytest.approx(num_layers * cycle_s(stages, 1), rel=1e-9)


@quick
@given(
    st.floats(1e-3, 1e-1),
    st.floats(1e-4, 1e-2),
    st.floats(1, 3),
    st.integers(1, 8),
    LAYERS,
    st.integers(2, 4),
)
def test_the_speedup_over_instances_that_do_both_is_the_closed_form(
    attention_s: float, dense_s: float, batch_ratio: float, num_attention: int, num_layers: int, count: int
) -> None:
    """FastAFD's, where the FFN side is hidden: N = 1, and a batch of 1 on an instance that does both."""
    together_s = attention_s + dense_s + 1e-2
    own_s = (batch_ratio * attention_s / count + dense_s) / num_layers
    found = run(StageTimes(own_s, 0.0, 0.9 * own_s, 0.0), num_layers, count, num_attention=num_attention, num_ffn=1)
    rate = num_attention * batch_ratio / steady_step_s(found) / (num_attention + 1)
    assert rate * together_s == pytest.approx(
        speedup(
            attention_s=attention_s,
            dense_s=dense_s,
            together_s=together_s,
            batch_ratio=batch_ratio,
            ratio=num_attention,
            num_microbatches=count,
        ),
        rel=1e-9,
    )


@quick
@given(STAGES, LAYERS, COUNTS)
def test_a_whole_run_is_its_fill_and_then_full_steps(stages: StageTimes, num_layers: int, count: int) -> None:
    """Fill + t_cycle (m L - 1), ai-dynamo's form, where the lanes before the one that binds fill it: for attention."""
    stages = dataclasses.replace(stages, attention_s=stages.around_s)
    found = run(stages, num_layers, count, 1)
    if count > 1:
        fill_s = stages.around_s - stages.attention_s
        assert found.end_s == pytest.approx(fill_s + layer_s(stages, count) * num_layers, rel=1e-9)
    else:
        assert found.end_s == pytest.approx(num_layers * stages.around_s, rel=1e-9)


@quick
@given(STAGES, LAYERS, COUNTS, st.floats(1e-6, 1e-2))
def test_heads_are_part_of_the_step_where_attention_binds(
    stages: StageTimes, num_layers: int, count: int, head_s: float
) -> None:
    others = stages.around_s - stages.attention_s
    if count > 1:
        stages = dataclasses.replace(stages, attention_s=max(others / (count - 1), stages.longest_s) * 1.001)
    found = run(stages, num_layers, count, 5, head_s)
    assert steady_step_s(found) == pytest.approx(step_s(stages, num_layers, count, head_s), rel=1e-9)


@quick
@given(st.floats(1e-3, 0.2), LAYERS, st.integers(2, 4), st.floats(0, 0.5), st.floats(1, 2))
def test_stages_of_the_budget_take_the_target_time(
    tpot_s: float, num_layers: int, count: int, gap_part: float, accepted: float
) -> None:
    """t_B = (TPOT accepted - gap) / (m L): three micro-batches and 61 layers in the papers."""
    gap_s = gap_part * tpot_s
    own_s = stage_budget_s(tpot_s, num_layers, count, gap_s=gap_s, accepted=accepted)
    stages = (
        StageTimes(own_s, 0.0, own_s * (count - 1) * 0.999, 0.0) if count == 2 else StageTimes(own_s, 0.0, own_s, 0.0)
    )
    found = run(stages, num_layers, count, 5, gap_s / count)
    assert steady_step_s(found) / accepted == pytest.approx(tpot_s, rel=1e-9)


def test_the_budget_of_the_report_is_273_microseconds() -> None:
    assert stage_budget_s(0.050, 61) * 1e6 == pytest.approx(273.2, abs=0.05)
    assert stage_budget_s(0.050, 61, 4) * 1e6 == pytest.approx(204.9, abs=0.05)


@quick
@given(st.floats(1e-5, 1e-3), st.floats(0, 1e-3), st.floats(1e-7, 1e-5), st.floats(0, 1e-3), st.integers(1, 100))
def test_the_best_ratio_of_instances_is_the_closed_form(
    attention_s: float, way_s: float, ffn_row_s: float, ffn_fixed_s: float, rows: int
) -> None:
    """Of all whole numbers of attention instances, one of the two around r* gives the most tokens per instance."""
    best = best_ratio(attention_s=attention_s, way_s=way_s, ffn_row_s=ffn_row_s, ffn_fixed_s=ffn_fixed_s, rows=rows)

    def tokens_per_instance(ratio: int) -> float:
        stages = StageTimes(attention_s, way_s, ffn_row_s * ratio * rows + ffn_fixed_s, way_s)
        # Enough micro-batches that no lane waits for one of them.
        count = math.ceil(stages.around_s / stages.longest_s)
        found = run(stages, 2, count, 3, num_attention=ratio)
        return ratio * rows * count / steady_step_s(found) / (ratio + 1)

    near = [max(1, math.floor(best)), max(1, math.ceil(best))]
    if near[-1] > 400:
        return
    others = {1, max(1, near[0] - 1), near[-1] + 1, 2 * near[-1] + 2, max(1, near[0] // 2)}
    assert max(map(tokens_per_instance, near)) >= max(map(tokens_per_instance, others)) * (1 - 1e-9)


@quick
@given(STAGES, st.integers(1, 4), COUNTS, st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**32))
def test_no_run_is_faster_than_any_of_its_lanes(
    stages: StageTimes, num_layers: int, count: int, num_attention: int, num_ffn: int, seed: int
) -> None:
    for bandwidth in (None, 1e9):
        pipeline = Pipeline(num_layers, count, num_attention, num_ffn, stages.latency_s, bandwidth, bandwidth)
        scale = bandwidth or 1.0
        work = Work.constant(
            pipeline,
            attention_s=stages.attention_s,
            ffn_s=stages.ffn_s,
            to_ffn=stages.to_ffn_s * scale,
            to_attention=stages.to_attention_s * scale,
        )
        found = simulate(pipeline, work, 3, draws=Draws(SPREAD, seed))
        length = (found.end_s - found.start_s) * (1 + 1e-9)
        assert max(found.attention_busy_s) <= length
        assert max(found.ffn_busy_s) <= length
        assert max(found.to_ffn_busy_s, found.to_attention_busy_s) <= length
        ends = found.step_ends_s()
        assert ends == sorted(ends)
        lanes: set[Lane] = {"attention", "to_ffn", "ffn", "to_attention"}
        kept = simulate(pipeline, work, 3, draws=Draws(SPREAD, seed), is_recorded=True).events
        for lane in lanes:
            own = sorted((one.start_s, one.end_s) for one in kept if one.stage.lane == lane)
            assert len(own) == 3 * num_layers * count
            assert all(before[1] <= after[0] + 1e-12 for before, after in itertools.pairwise(own))


@quick
@given(STAGES, st.integers(1, 4), COUNTS, st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_many_equal_instances_take_as_long_as_one_that_stands_for_them(
    stages: StageTimes, num_layers: int, count: int, num_attention: int, num_ffn: int, slower: int
) -> None:
    """A transfer takes the busier link's bytes of a micro-batch over its bandwidth: the heap's events agree."""
    pipeline = Pipeline(num_layers, count, num_attention, num_ffn, stages.latency_s, 1e9, slower * 1e9)
    work = Work.constant(
        pipeline,
        attention_s=stages.attention_s,
        ffn_s=stages.ffn_s,
        to_ffn=stages.to_ffn_s * 1e9,
        to_attention=stages.to_attention_s * 1e9,
        head_s=1e-5,
    )
    found = run_shared(pipeline, work, 3, Draws(), 0.0, None)
    folded = run_in_order(*fold(pipeline, work), 3, Draws(), 0.0, None)
    assert found.step_ends_s() == pytest.approx(folded.step_ends_s(), rel=1e-9)
    assert found.attention_busy_s[0] == pytest.approx(folded.attention_busy_s[0], rel=1e-9)


@quick
@given(STAGES, LAYERS, COUNTS, st.integers(0, 2**32))
def test_events_in_order_are_those_of_the_heap(stages: StageTimes, num_layers: int, count: int, seed: int) -> None:
    """One instance per side: a link then has one flow at a time, and the order of the draws is the same."""
    shared = Pipeline(num_layers, count, latency_s=stages.latency_s, attention_bytes_s=1.0, ffn_bytes_s=1.0)
    work = Work.constant(
        shared,
        attention_s=stages.attention_s,
        ffn_s=stages.ffn_s,
        to_ffn=stages.to_ffn_s,
        to_attention=stages.to_attention_s,
        head_s=2e-6,
    )
    by_heap = run_shared(shared, work, 3, Draws(SPREAD, seed), 1.0, None)
    in_order = run_in_order(*fold(shared, work), 3, Draws(SPREAD, seed), 1.0, None)
    assert by_heap.step_ends_s() == pytest.approx(in_order.step_ends_s(), rel=1e-9)
    assert by_heap.num_events == in_order.num_events
    assert by_heap.to_ffn_busy_s == pytest.approx(in_order.to_ffn_busy_s, rel=1e-9)


@quick
@given(st.integers(1, 3), COUNTS, st.integers(1, 3), st.integers(1, 3), st.floats(0, 1e-3), st.integers(0, 2**32))
def test_every_instance_and_micro_batch_may_have_other_times(
    num_layers: int, count: int, num_attention: int, num_ffn: int, latency_s: float, seed: int
) -> None:
    """Nothing is assumed about what overtakes what: a textbook simulation, with a queue before every lane, agrees."""
    rng = np.random.default_rng(seed)
    pipeline = Pipeline(num_layers, count, num_attention, num_ffn, latency_s)
    work = Work(
        attention_s=tuple(map(tuple, rng.exponential(1e-3, (count, num_attention)).tolist())),
        ffn_s=tuple(map(tuple, rng.exponential(1e-3, (count, num_ffn)).tolist())),
        to_ffn=tuple(rng.exponential(1e-3, count).tolist()),
        to_attention=tuple(rng.exponential(1e-3, count).tolist()),
        growth_s=tuple(map(tuple, rng.exponential(1e-4, (count, num_attention)).tolist())),
        head_s=tuple(rng.exponential(1e-4, count).tolist()),
    )
    found = simulate(pipeline, work, 3).tokens_s
    expected = run_textbook(pipeline, work, 3)
    for step, other in zip(found, expected, strict=True):
        for row, other_row in zip(step, other, strict=True):
            assert row == pytest.approx(other_row, rel=1e-9)


def test_one_micro_batch_waits_for_the_slowest_instance() -> None:
    """With r workers the mean of a layer is that of the slowest of r draws (arXiv 2601.21351, second version)."""
    spread: dict[Lane, Jitter] = {"attention": Jitter(samples=(1.0, 3.0))}
    pipeline = Pipeline(50, 1, num_attention=3)
    work = Work.constant(pipeline, attention_s=1.0, ffn_s=1.0, to_ffn=0.0, to_attention=0.0)
    found = simulate(pipeline, work, 100, draws=Draws(spread, 1))
    # Of three that are 0.5 or 1.5 with equal chance the largest is 0.5 once in eight times.
    assert found.end_s / 5000 == pytest.approx(1.0 + 0.5 / 8 + 1.5 * 7 / 8, rel=0.02)
    again = simulate(pipeline, work, 100, draws=Draws(spread, 1))
    assert again.tokens_s == found.tokens_s
    assert simulate(pipeline, work, 100, draws=Draws(spread, 2)).end_s != found.end_s


def test_contexts_that_grow_slow_each_step_down_by_as_much() -> None:
    pipeline = Pipeline(3, 2)
    work = Work.constant(pipeline, attention_s=1.0, ffn_s=0.1, to_ffn=0.0, to_attention=0.0)
    work = dataclasses.replace(work, growth_s=((0.25,), (0.25,)))
    ends = simulate(pipeline, work, 4).step_ends_s()
    steps = [after - before for before, after in itertools.pairwise(ends)]
    assert steps == pytest.approx([3 * 2 * (1 + 0.25 * step) for step in (1, 2, 3)])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_layers": 0}, "num_layers is 0"),
        ({"num_microbatches": 0}, "num_microbatches is 0"),
        ({"num_attention": 5000}, "at most 1024 instances"),
        ({"latency_s": -1.0}, "latency_s is -1"),
        ({"attention_bytes_s": 1e9}, "give both or neither"),
        ({"attention_bytes_s": 0.0, "ffn_bytes_s": 1.0}, "more than 0"),
    ],
)
def test_a_pipeline_that_cannot_be_is_refused(changes: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Pipeline(**({"num_layers": 2, "num_microbatches": 3} | changes))  # type: ignore[arg-type]


def test_work_of_another_pipeline_is_refused() -> None:
    pipeline = Pipeline(2, 2)
    work = Work.constant(pipeline, attention_s=1.0, ffn_s=1.0, to_ffn=0.0, to_attention=0.0)
    with pytest.raises(ValueError, match="3 micro-batches on 1 instances"):
        simulate(Pipeline(2, 3), work, 1)
    with pytest.raises(ValueError, match="at least 1 is needed"):
        simulate(pipeline, work, 0)
    with pytest.raises(ValueError, match="negative or unbounded"):
        simulate(pipeline, dataclasses.replace(work, to_ffn=(math.nan, 0.0)), 1)
    with pytest.raises(ValueError, match="at least 0"):
        Jitter(-0.1)
