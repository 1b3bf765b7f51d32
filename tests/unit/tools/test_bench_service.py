"""The benchmark of the service: its requests, and a run of it on a small model."""

from __future__ import annotations

import json
import pathlib

import pytest

from tools.bench_service import OUTPUT, PROMPT, main, make_bodies, thread_seconds


def test_requests_are_of_the_lengths_asked_for_and_share_no_start() -> None:
    bodies = make_bodies(20, 1000, seed=3)
    prompts = [body["prompt"] for body in bodies]
    assert all(PROMPT[0] <= len(prompt) <= PROMPT[1] for prompt in prompts)
    assert all(OUTPUT[0] <= body["max_tokens"] <= OUTPUT[1] for body in bodies)
    assert len({tuple(prompt[:4]) for prompt in prompts}) == 20
    assert make_bodies(20, 1000, seed=4) != bodies


def test_processor_seconds_are_told_by_thread() -> None:
    before = thread_seconds()
    total = sum(number * number for number in range(2_000_000))
    after = thread_seconds()
    assert total > 0
    assert set(after) == {"event_loop", "engine", "others"}
    assert sum(after.values()) > sum(before.values())


@pytest.mark.slow  # A service, its warm-up, and hundreds of requests.
def test_every_figure_is_there(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "figures.json"
    words = ["bench_service", "--preset", "tiny", "--rounds", "1", "--requests", "34", "--first-tokens", "2"]
    monkeypatch.setattr("sys.argv", [*words, "--json", str(file)])
    assert main() == 0
    found = json.loads(file.read_text())["service"]
    assert found["throughput_ratio"] > 0
    assert found["first_token"]["through_http_ms"] > 0
    assert found["overload"]["answered"] > 0
    assert found["idle"]["connections"] == 1000
