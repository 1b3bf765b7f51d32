"""The long load on the service: what it calls a problem, and a short run of it."""

from __future__ import annotations

import json
import pathlib

import pytest

from tests.process import free_port
from tools.soak_service import find_problems, main

GOOD = {
    "requests": {"asked": 10, "answered": 6, "left": 3, "refused": 1},
    "compilations": 0,
    "running_at_end": 0,
    "waiting_at_end": 0,
    "cache_use_at_end": 0.0,
    "anonymous_growth": 0.01,
}


def test_a_run_in_which_all_is_answered_and_given_back_has_no_problem() -> None:
    assert find_problems(GOOD) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"requests": {"asked": 2, "answered": 1, "status 500: x": 1}}, "1 x status 500"),
        ({"requests": {"asked": 3, "answered": 1}}, "requests are missing"),
        ({"compilations": 1}, "compilations is 1"),
        ({"running_at_end": 2}, "running_at_end is 2"),
        ({"cache_use_at_end": 0.5}, "cache_use_at_end is 0.5"),
        ({"anonymous_growth": 0.03}, "memory grew by 3.0%"),
    ],
)
def test_what_must_not_be_is_told(change: dict[str, object], problem: str) -> None:
    found = find_problems(GOOD | change)
    assert len(found) == 1
    assert problem in found[0]


@pytest.mark.slow  # Two minutes, most of them the warm-up of the service.
def test_a_short_run_counts_its_requests(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "figures.json"
    words = ["soak_service", "--minutes", "0.3", "--clients", "4", "--port", str(free_port()), "--json", str(file)]
    monkeypatch.setattr("sys.argv", words)
    main()
    found = json.loads(file.read_text())["soak"]
    # In such a short time memory still grows, as caches fill.
    assert [problem for problem in find_problems(found) if "memory" not in problem] == []
    assert found["requests"]["answered"] > 4
    assert found["exit_code"] == 0
