"""The measurement of what guessed tokens save."""

from __future__ import annotations

import json
import pathlib

import pytest

from tools.bench_speculation import main


@pytest.mark.slow
@pytest.mark.parametrize("model", [[], ["--preset", "tiny"]], ids=["shipped", "random"])
def test_all_sides_are_measured_and_give_the_same(tmp_path: pathlib.Path, model: list[str]) -> None:
    """It compiles the programs of two engines."""
    path = tmp_path / "found.json"
    words = ["--tokens", "24", "--guesses", "3", "--batches", "2", "--rounds", "1", "--json", str(path)]
    assert main([*words, *model]) == 0
    rows = json.loads(path.read_text())["speculation"]
    assert {row["guesses"] for row in rows} == {0, 3}
    assert all(row["same_outputs"] == 1 for row in rows)
    steps = {guesses: sum(row["steps"] for row in rows if row["guesses"] == guesses) for guesses in (0, 3)}
    assert steps[3] < steps[0]
