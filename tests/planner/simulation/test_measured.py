"""Measured stage times, from files in two formats."""

from __future__ import annotations

import json
import pathlib

import pytest

from step3_jax.planner.simulation.lane import Pipeline, Work
from step3_jax.planner.simulation.measured import collect_stages, read_stages
from step3_jax.planner.simulation.simulate import simulate
from step3_jax.timeline.trace import write_trace


def test_a_simulated_trace_gives_the_times_that_it_was_made_of(tmp_path: pathlib.Path) -> None:
    pipeline = Pipeline(4, 3)
    work = Work.constant(pipeline, attention_s=3e-3, ffn_s=2e-3, to_ffn=5e-4, to_attention=7e-4, head_s=1e-3)
    events = simulate(pipeline, work, 3, is_recorded=True).events
    write_trace(tmp_path / "trace.json", events)
    for found in (collect_stages(events, "here"), read_stages(tmp_path / "trace.json")):
        means = {lane: found.mean_s(lane) for lane in ("attention", "to_ffn", "ffn", "to_attention")}
        assert means == pytest.approx({"attention": 3e-3, "to_ffn": 5e-4, "ffn": 2e-3, "to_attention": 7e-4})
        assert found.head_s == pytest.approx(1e-3)
        assert len(found.samples_s["attention"]) == 3 * 4 * 3


def test_a_file_of_times_is_read(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "times.json"
    times = {"attention_us": [1, 3], "to_ffn_us": [0], "ffn_us": [2.5], "to_attention_us": [1.0]}
    file.write_text(json.dumps(times | {"head_us": 10, "source": "two runs"}))
    found = read_stages(file)
    assert found.mean_s("attention") == pytest.approx(2e-6)
    assert found.head_s == pytest.approx(1e-5)
    assert found.source == "two runs"
    assert sorted(found.jitter()) == ["attention", "ffn", "to_attention"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1]", "holds list"),
        ('{"attention_us": [1], "ffn_us": [1]', "not JSON, or not complete"),
        ('{"attention_us": [1]}', "to_ffn_us must be a list"),
        ('{"attention_us": [-1]}', "attention_us must be a list"),
        ('{"atention_us": [1]}', "did you mean attention_us"),
        ('{"traceEvents": 3}', "is not a trace"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path: pathlib.Path, text: str, said: str) -> None:
    file = tmp_path / "times.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=said):
        read_stages(file)
    with pytest.raises(ValueError, match="cannot be read"):
        read_stages(tmp_path / "none.json")
