"""A trace says which lane did what when, can be read by Chrome's viewer, and draws a timeline."""

from __future__ import annotations

import json
import pathlib
import xml.etree.ElementTree as ET

import jax.numpy as jnp
import pytest

from step3_jax.afd.host.flight import Flight, reconstruct
from step3_jax.timeline.event import Event, Lane, Stage
from step3_jax.timeline.picture import COLOURS, draw, pick_window, write_picture
from step3_jax.timeline.trace import measure, read_trace, write_trace


def pipeline(num_layers: int = 6, num_microbatches: int = 3) -> list[Event]:
    """A full pipeline: attention and FFN of one second each, the ways between of half a second."""
    events = []
    free = {"attention": 0.0, "to_ffn": 0.0, "ffn": 0.0, "to_attention": 0.0}
    arrived = [0.0] * num_microbatches
    for layer in range(num_layers):
        for index in range(num_microbatches):
            for lane, length in (("attention", 1.0), ("to_ffn", 0.5), ("ffn", 1.0), ("to_attention", 0.5)):
                start = max(free[lane], arrived[index])
                free[lane] = arrived[index] = start + length
                events.append(Event(Stage(lane, "decode", 0, layer, index), start, start + length))
    return sorted(events, key=lambda event: event.end_s)


def test_efficiency_is_the_busiest_lanes_share_of_the_time() -> None:
    found = measure(pipeline(60))
    assert found.busy_s == pytest.approx({"attention": 1.0, "ffn": 1.0, "exchange": 0.5})
    assert found.tick_s == pytest.approx(1.0, abs=0.02)
    assert found.efficiency == pytest.approx(1.0, abs=0.02)
    # One micro-batch alone: each lane waits for the others.
    assert measure(pipeline(60, 1)).efficiency == pytest.approx(1 / 3, abs=0.01)
    prefill = [event._replace(stage=event.stage._replace(phase="prefill")) for event in pipeline()]
    with pytest.raises(ValueError, match="no decode step"):
        measure(prefill)


def test_starts_follow_from_ends() -> None:
    expected = pipeline()
    ends: dict[str, list[tuple[Stage, float, float]]] = {}
    for event in expected:
        # All of it was dispatched at once.
        ends.setdefault(event.stage.lane, []).append((event.stage, 0.0, event.end_s))
    found = {event.stage: event for event in reconstruct(ends)}
    assert len(found) == len(expected)
    for event in expected:
        assert found[event.stage].start_s == pytest.approx(event.start_s)


def test_the_file_is_a_chrome_trace_and_is_read_back(tmp_path: pathlib.Path) -> None:
    events = pipeline(2)
    write_trace(tmp_path / "trace.json", events)
    values = json.loads((tmp_path / "trace.json").read_text())
    rows = [row for row in values["traceEvents"] if row["ph"] == "X"]
    assert len(rows) == len(events)
    assert rows[0]["ts"] == 0
    assert rows[0]["dur"] == 1e6
    assert rows[0]["name"] == "D1 layer 0"
    names = [row["args"]["name"] for row in values["traceEvents"] if row["name"] == "thread_name"]
    assert names == ["attention", "attention to FFN", "FFN", "FFN to attention"]
    for left, right in zip(read_trace(tmp_path / "trace.json"), events, strict=True):
        assert left.stage == right.stage
        assert (left.start_s, left.end_s) == pytest.approx((right.start_s, right.end_s))
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"traceEvents": [{"ph": "X"}]}', '{"traceEvents": [{"ph": "X", "args": {}}]}']
)
def test_another_file_is_refused(tmp_path: pathlib.Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.json is not a trace"):
        read_trace(tmp_path / "x.json")


def test_the_picture_has_a_box_for_each_stage(tmp_path: pathlib.Path) -> None:
    events = pipeline()
    root = ET.fromstring(draw(events, "1A1F <full>"))
    space = "{http://www.w3.org/2000/svg}"
    boxes = [box for box in root.iter(f"{space}rect") if box.find(f"{space}title") is not None]
    assert len(boxes) == len(events)
    assert {box.get("fill") for box in boxes} == set(COLOURS[:3])
    texts = [text.text for text in root.iter(f"{space}text")]
    assert "1A1F <full>" in texts
    assert "micro-batch D3" in texts
    # Later events are further to the right, and inside the picture.
    for box in boxes:
        assert 130 <= float(box.get("x", 0)) <= float(root.get("width", 0)) - 20
    write_picture(tmp_path / "afd.svg", events, title="x")
    assert "efficiency" in (tmp_path / "afd.svg").read_text()
    with pytest.raises(ValueError, match=r"ends in \.svg"):
        write_picture(tmp_path / "afd.png", events, title="x")


def test_the_picture_shows_the_middle() -> None:
    picked = pick_window(pipeline(60), 9)
    ffn = [event.stage.layer for event in picked if event.stage.lane == "ffn"]
    assert len(ffn) in (9, 10, 11)
    assert 25 <= min(ffn) <= max(ffn) <= 35


def test_waits_have_a_deadline_that_names_the_stage() -> None:
    class Never:
        def is_ready(self) -> bool:
            return False

    flight = Flight(0.05)
    flight.push(Stage("attention", "decode", 4, 0, 0), jnp.zeros(()), 8)
    flight.push(Stage("to_attention", "decode", 4, 7, 2), Never(), 8)  # type: ignore[arg-type]
    with pytest.raises(
        TimeoutError, match=r"the exchange from FFN to attention of layer 7, micro-batch 2 \(decode 4\)"
    ):
        flight.drain()
    # What was lost is forgotten.
    flight.drain()
    with pytest.raises(TimeoutError, match="layer 1"):
        flight.push(Stage("ffn", "prefill", 0, 1, 0), Never(), 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="deadline is 0 s"):
        Flight(0)


def test_time_counts_as_waited_for_the_ffn_side_while_attention_has_nothing_to_compute() -> None:
    class Later:
        def __init__(self, looks: int) -> None:
            self.looks = looks

        def is_ready(self) -> bool:
            self.looks -= 1
            return self.looks < 0

    def run(*stages: tuple[Lane, int, int, int]) -> float:
        flight = Flight(10)
        for lane, layer, microbatch, looks in stages:
            flight.push(Stage(lane, "decode", 0, layer, microbatch), Later(looks), 8)  # type: ignore[arg-type]
        flight.drain()
        return flight.ffn_wait_s

    assert run(("attention", 0, 0, 9), ("to_attention", 0, 0, 0), ("attention", 1, 0, 0)) == 0
    # The other micro-batch keeps attention busy.
    assert run(("to_attention", 0, 0, 9), ("attention", 0, 1, 40), ("attention", 1, 0, 40)) == 0
    assert run(("to_attention", 0, 0, 9), ("attention", 0, 1, 0), ("attention", 1, 0, 20)) > 0
    assert run(("attention", 0, 0, 0), ("ffn", 0, 0, 9)) > 0
