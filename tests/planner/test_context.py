"""Contexts of a batch: numbers, distributions, traces, and the most loaded device."""

from __future__ import annotations

import numpy as np
import pytest

from step3_jax.planner.context import parse_contexts, trace_contexts
from step3_jax.planner.trace_file import TraceRequest


def test_a_context_is_the_same_for_all_sequences() -> None:
    found = parse_contexts("8k")
    assert (found.mean, found.deviation, found.longest, found.prompt_tokens) == (8192, 0, 8192, 8192)
    assert found.count_busiest(np.array([3.0]), 16) == 3 * 8192


def test_a_sequence_has_whole_pages() -> None:
    found = parse_contexts("8000")
    assert parse_contexts("8001").page_mean == 8064
    assert (found.mean, found.page_mean) == (8000, 8000)


def test_shares_of_a_distribution_count_in_proportion() -> None:
    found = parse_contexts("4k:75,8k:25")
    assert found.mean == 0.75 * 4096 + 0.25 * 8192
    assert found.mean == parse_contexts("4k:3,8k:1").mean
    assert found.longest == 8192


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0", "at least 1"),
        ("8q", "no unit q"),
        ("4k,8k", "a share above 0"),
        ("4k:0,8k:1", "a share above 0"),
        ("4k:x,8k:1", "a share above 0"),
        ("65537", "the model has 65,536 positions"),
        ("4k:1,128k:1", "131,072 tokens; the model has 65,536 positions"),
    ],
)
def test_a_mistake_is_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_contexts(text)


def test_the_contexts_of_a_trace_are_weighted_by_the_tokens_decoded_at_them() -> None:
    # 1 token at 100; 3 at 10, 11, 12.
    found = trace_contexts("trace", [TraceRequest(100, 1), TraceRequest(10, 3)])
    assert found.mean == (100 + 10 + 11 + 12) / 4
    assert (found.longest, found.prompt_tokens) == (100, 55)


def test_the_busiest_device_has_about_as_much_as_a_draw_gives_it() -> None:
    found = parse_contexts("2k:50,6k:50")
    rows, devices = 64, 16
    rng = np.random.default_rng(0)
    drawn = rng.choice([2048, 6144], (2000, devices, rows)).sum(axis=2).max(axis=1).mean()
    counted = found.count_busiest(np.array([float(rows)]), devices)[0]
    assert rows * found.mean < drawn <= counted < 1.05 * drawn
    assert found.count_busiest(np.array([8.0]), 1) == 8 * found.mean
