"""What is said about an unknown name."""

from __future__ import annotations

import pytest

from step3_jax.nearest import describe_known, find_nearest

KNOWN = ["a100-80gb", "h20", "h200-sxm", "h800-sxm"]


@pytest.mark.parametrize(
    ("given", "nearest"),
    [("h200", "h200-sxm"), ("H20", "h20"), ("h80", "h800-sxm"), ("h2O0-sxm", "h200-sxm"), ("tpu", None), ("", None)],
)
def test_the_nearest_begins_so_or_is_spelt_nearly_so(given: str, nearest: str | None) -> None:
    assert find_nearest(given, KNOWN) == nearest


def test_all_names_are_listed() -> None:
    assert describe_known("h200", KNOWN) == "; did you mean h200-sxm? Known: a100-80gb, h20, h200-sxm, h800-sxm"
    assert describe_known("tpu", ["x", "y"]) == "; known: x, y"
