"""The search: published deployments, and what holds for every answer."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from step3_jax.config import ModelConfig
from step3_jax.planner.candidate import parse_pool
from step3_jax.planner.context import parse_contexts
from step3_jax.planner.cost import Prices
from step3_jax.planner.estimate import Judge
from step3_jax.planner.expert_load import even_load
from step3_jax.planner.front import find_front, find_undominated
from step3_jax.planner.memory import plan_memory
from step3_jax.planner.published import load_processor_shares
from step3_jax.planner.query import FIRST_TOKEN_TARGET, MEMORY, TARGET, Found, Query
from step3_jax.planner.search import Answer, Search

STEP3 = ModelConfig.preset("step3")


def ask(
    context: str, *pools: str, target_ms: float = 50, prices: dict[str, float] | None = None, **changes: object
) -> Query:
    query = Query(
        config=STEP3,
        weights="fp8",
        kv_cache="fp8",
        contexts=parse_contexts(context),
        load=even_load(STEP3.text),
        pools=[parse_pool(pool, Prices(prices or {})) for pool in pools],
        target_s=target_ms / 1e3,
        text_only=True,
    )
    return dataclasses.replace(query, **changes)


def search(query: Query, *only: str) -> Answer:
    return Search(query, only).answer(5)


def check_memory(found: Found, query: Query) -> None:
    """The rule of `step3 plan memory --no-compile`, applied again."""
    candidate = found.candidate
    plan = plan_memory(
        query.config,
        found.deployment,
        memory_gib=candidate.attention.hardware.memory_gib,
        ffn_memory_gib=candidate.ffn.hardware.memory_gib,
        text_only=query.text_only,
    )
    assert not plan.problems, (candidate.name, plan.problems)


@pytest.mark.parametrize(
    ("context", "devices", "best"), [("4k", 32, "2a2f"), ("8k", 48, "4a2f")], ids=["2A2F at 4K", "4A2F at 8K"]
)
def test_the_reports_deployment_is_the_best_apart_on_its_devices(context: str, devices: int, best: str) -> None:
    """Table 8 of arXiv 2507.19427, by expected times: three micro-batches and at least the published batch of 6,144."""
    query = ask(context, f"h800:{devices}")
    found = search(query, "afd").best[0]
    assert found.candidate.name == best
    assert found.candidate.devices == f"{devices - 16} h800 + 16 h800"
    assert found.deployment.num_microbatches == 3
    assert 6144 <= found.sequences < 1.1 * 6144
    assert found.limit == TARGET


def test_16a2f_at_32k_meets_the_target_with_its_batch() -> None:
    """The report scales attention with the context; longer ones reach more of the bandwidth, so that less would do."""
    query = ask("32k", "h800:144")
    whole = Search(query, ["16a2f"])
    (found,) = whole.answer(1).best
    assert found.sequences >= 6144
    assert found.expected.step_s <= 0.05
    # 897.6 tokens/s per GPU at 6,144 sequences, by the report's scaling from 4K.
    same_batch = whole.table.find(found.candidate, 3, 16, TARGET)
    assert same_batch.sequences == 6144
    assert same_batch.expected.tokens_per_s_per_device == pytest.approx(897.6, rel=0.05)
    best = search(query, "afd").best[0]
    assert best.candidate.name == "12a2f"
    rates = [one.expected.tokens_per_s_per_device for one in (found, best)]
    assert rates[0] < rates[1] < 1.1 * rates[0]


def test_with_ideal_times_one_ffn_instance_would_do_at_4k() -> None:
    """Why the report has two: at the share of the roofline reached, one reads its weights too slowly for 50 ms."""
    query = ask("4k", "h800:32", judge="ideal")
    (ideal,) = search(query, "3a1f").best
    assert ideal.sequences >= 6144 * 3 / 2
    assert ideal.expected.step_s > 0.09
    assert "routed experts" in ideal.expected.binds
    (both,) = search(query, "2a2f").best
    assert both.ideal.tokens_per_s <= 1.05 * ideal.ideal.tokens_per_s


def test_two_kinds_of_hardware_are_cheapest_as_the_report_has_them() -> None:
    """Section 4.2 of the report: H20 for attention, H800 for the FFN."""
    best = search(ask("8k", "h800:32", "h20:64")).best[0]
    assert best.candidate.kind == "afd"
    assert (best.candidate.attention.hardware.name, best.candidate.ffn.hardware.name) == ("h20", "h800")


@pytest.mark.parametrize("text_only", [True, False])
def test_eight_cards_of_48_gb_hold_800_000_tokens_with_images_too(text_only: bool) -> None:
    query = ask("4k", "rtx-6000-ada:8", target_ms=200, text_only=text_only)
    best = search(query).best[0]
    assert best.candidate.name == "tp8"
    assert best.kv_tokens >= 800_000
    assert best.sequences * 4096 >= 800_000


def test_experts_in_host_memory_decode_where_one_card_is_all_there_is() -> None:
    answer = search(ask("4k", "h800:1", "cpu-2-socket:1", target_ms=1000), "afd")
    (best,) = answer.best
    assert best.candidate.devices == "1 h800 + 1 cpu-2-socket"
    assert best.expected.step_s < 1
    assert best.expected.usd_per_million_tokens is None
    assert not answer.query.has_prices
    assert best.expectation.shares.ffn == load_processor_shares().ffn


@given(
    context=st.sampled_from(["2k", "8k", "48k", "1k:80,32k:20"]),
    pools=st.sampled_from([("h800:24",), ("h20:16", "h800:16"), ("h100-sxm:16",)]),
    targets=st.tuples(st.floats(4, 300), st.floats(1, 4)),
    judge=st.sampled_from(["expected", "ideal"]),
    text_only=st.booleans(),
)
@settings(max_examples=12, deadline=None)
def test_a_looser_target_is_never_dearer_and_all_that_is_shown_fits(
    context: str, pools: tuple[str, ...], targets: tuple[float, float], judge: Judge, text_only: bool
) -> None:
    prices = {"h100-sxm": 2.5}
    tight = ask(context, *pools, target_ms=targets[0], judge=judge, prices=prices, text_only=text_only)
    loose = dataclasses.replace(tight, target_s=tight.target_s * targets[1])
    answers = [search(query) for query in (tight, loose)]
    for answer in answers:
        shown = [*answer.best, *filter(None, (answer.fewest, answer.nearest))]
        for one in shown:
            check_memory(one, answer.query)
            assert one.expected.step_s >= one.ideal.step_s
        for one in answer.best:
            assert one.speed(judge).step_s <= answer.query.target_s * (1 + 1e-9)
        costs = [one.speed(judge).usd_per_million_tokens for one in answer.best]
        assert costs == sorted(costs)
        assert answer.fewest is None or all(
            answer.fewest.candidate.num_devices <= one.candidate.num_devices for one in shown
        )
    if answers[0].best:
        dear, cheap = (answer.best[0].speed(judge).usd_per_million_tokens for answer in answers)
        assert cheap <= dear * (1 + 1e-9)


@given(
    counts=st.tuples(st.integers(6, 24), st.integers(1, 16)),
    more=st.tuples(st.integers(0, 16), st.integers(0, 16)),
    target_ms=st.floats(15, 150),
)
@settings(max_examples=8, deadline=None)
def test_more_hardware_is_never_dearer(counts: tuple[int, int], more: tuple[int, int], target_ms: float) -> None:
    few, many = (
        search(ask("8k", f"h800:{h800}", f"h20:{h20}", target_ms=target_ms))
        for h800, h20 in (counts, tuple(map(sum, zip(counts, more, strict=True))))
    )
    if few.best:
        dear, cheap = (one.best[0].expected.usd_per_million_tokens for one in (few, many))
        assert cheap <= dear * (1 + 1e-9)


def test_the_largest_batch_is_found_to_the_sequence() -> None:
    query = ask("4k", "h800:32")
    whole = Search(query, ["2a2f"])
    found = whole.answer(1).best[0]
    step_s = whole.table.count_stages(
        found.candidate, np.array([found.rows, found.rows + 1.0]), "expected"
    ).step_seconds(3)
    assert step_s[0] <= 0.05 < step_s[1]


def test_memory_limits_the_batch_to_the_sequence() -> None:
    query = ask("32k", "h800:16", target_ms=500)
    whole = Search(query, ["ep16"])
    found = whole.answer(1).best[0]
    assert found.limit == MEMORY
    assert whole.table.plan(found.candidate, 1, found.rows + 1).problems


def test_a_target_for_the_first_token_makes_batches_smaller() -> None:
    query = ask("8k", "h800:32")
    (whole,), (fast,) = (
        search(dataclasses.replace(query, first_token_s=seconds), "2a2f").best for seconds in (None, 0.9)
    )
    assert whole.expected.first_token_s > 0.9 >= fast.expected.first_token_s
    assert fast.sequences < whole.sequences
    assert fast.limit == FIRST_TOKEN_TARGET


def test_where_nothing_meets_the_target_the_nearest_is_told() -> None:
    answer = search(ask("8k", "h800:32", target_ms=2))
    assert not answer.best
    assert answer.fewest is None
    nearest = answer.nearest
    assert nearest is not None
    assert nearest.expected.step_s > 0.002
    wider = search(ask("8k", "h800:32", target_ms=nearest.expected.step_s * 1e3 * 1.0001))
    assert wider.best


def test_where_nothing_fits_the_memory_it_is_said_why() -> None:
    answer = search(ask("8k", "h800:4"))
    assert (answer.best, answer.nearest) == ([], None)
    assert "4 h800: weights of" in answer.obstacle[0]


def test_a_measured_load_of_the_experts_costs_more_than_an_even_one() -> None:
    query = ask("4k", "h800:32")
    even = query.load
    skewed = np.ones((1, 48))
    skewed[0, :3] = 6
    load = dataclasses.replace(even, shares=skewed / skewed.sum())
    costs = [
        search(dataclasses.replace(query, load=one), "ep32").best[0].expected.usd_per_million_tokens
        for one in (even, load)
    ]
    assert costs[1] > 1.05 * costs[0]


@pytest.mark.parametrize("is_apart", [True, False], ids=["apart", "both"])
def test_no_batch_beats_a_front_in_speed_and_cost(is_apart: bool) -> None:
    query = ask("8k", "h800:24")
    whole = Search(query)
    front = find_front(whole, is_apart=is_apart)
    points = [(one.expected.step_s, one.expected.usd_per_million_tokens) for one in front]
    assert len(points) > 10
    for (fast, dear), (slow, cheap) in itertools.pairwise(points):
        assert fast < slow
        assert dear > cheap
    for one in front:
        check_memory(one, query)
    for batches in whole.batches:
        if (batches.candidate.topology is not None) is is_apart:
            most = whole.table.fit_rows(batches.candidate, batches.num_microbatches, int(batches.rows[-1]))
            for rows, step_s, cost in zip(batches.rows, batches.step_s, batches.cost, strict=True):
                if rows <= most:
                    assert not any(step_s < other and cost < dear * (1 - 1e-9) for other, dear in points)


def test_of_points_only_those_that_none_beats_are_left() -> None:
    step_s, cost = np.array([3.0, 1.0, 2.0, 2.0, 4.0, 1.0]), np.array([1.0, 5.0, 2.0, 3.0, 1.0, 6.0])
    assert find_undominated(step_s, cost) == [1, 2, 0]
