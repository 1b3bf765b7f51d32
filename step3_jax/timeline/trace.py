"""Traces: when each lane computed which micro-batch of which layer, in the format of Chrome and Perfetto."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import cast, get_args

from step3_jax.timeline.event import Event, Lane, Stage

# Rows of the picture from top to bottom, as threads of one process.
LANE_NAMES: dict[Lane, str] = {
    "attention": "attention",
    "to_ffn": "attention to FFN",
    "ffn": "FFN",
    "to_attention": "FFN to attention",
}


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """How well a pipeline is filled.

    Attributes:
      tick_s: Time of one layer of one micro-batch, all lanes working: the length of the trace divided by their number.
      busy_s: Mean time that each lane works on one layer of one micro-batch.
      efficiency: The busiest lane's time divided by the tick: 1 if that lane never waits.
    """

    tick_s: float
    busy_s: Mapping[str, float]
    efficiency: float


def steady_part(events: Sequence[Event]) -> list[Event]:
    """The decode steps after the last chunk of a prompt, where there is only decoding.

    Raises:
      ValueError: If there are none.
    """
    last = max((event.end_s for event in events if event.stage.phase == "prefill"), default=0.0)
    picked = [event for event in events if event.stage.phase == "decode" and event.start_s >= last]
    if not any(event.stage.lane == "ffn" for event in picked):
        raise ValueError("the trace has no decode step after its last prompt: request more tokens")
    return picked


def measure(events: Sequence[Event]) -> Efficiency:
    """The efficiency of the steady part of a trace; the head is part of the attention lane's work.

    Raises:
      ValueError: If there is no such part.
    """
    events = steady_part(events)
    ticks = sum(event.stage.lane == "ffn" for event in events)
    length = max(event.end_s for event in events) - min(event.start_s for event in events)
    busy = dict.fromkeys(LANE_NAMES, 0.0)
    for event in events:
        busy[event.stage.lane] += event.end_s - event.start_s
    exchange = busy["to_ffn"] + busy["to_attention"]
    per_tick = {name: time / ticks for name, time in (("attention", busy["attention"]), ("ffn", busy["ffn"]))}
    # Each direction has its own link, so each may take a tick.
    per_tick["exchange"] = max(busy["to_ffn"], busy["to_attention"]) / ticks if exchange else 0.0
    return Efficiency(length / ticks, per_tick, max(per_tick.values()) * ticks / length if length else 0.0)


def to_chrome(events: Sequence[Event]) -> dict[str, object]:
    """Events as a Chrome trace: one thread per lane, times in microseconds."""
    tids = {lane: number for number, lane in enumerate(LANE_NAMES)}
    rows: list[dict[str, object]] = [
        {"ph": "M", "name": "process_name", "pid": 0, "args": {"name": "step3 AFD"}},
    ]
    for lane, tid in tids.items():
        rows.append({"ph": "M", "name": "thread_name", "pid": 0, "tid": tid, "args": {"name": LANE_NAMES[lane]}})
        rows.append({"ph": "M", "name": "thread_sort_index", "pid": 0, "tid": tid, "args": {"sort_index": tid}})
    for stage, start, end in events:
        rows.append(
            {
                "ph": "X",
                "name": f"D{stage.microbatch + 1} layer {stage.layer}",
                "cat": stage.phase,
                "pid": 0,
                "tid": tids[stage.lane],
                "ts": round(start * 1e6, 3),
                "dur": round((end - start) * 1e6, 3),
                "args": stage._asdict(),
            }
        )
    return {"traceEvents": rows, "displayTimeUnit": "ms"}


def write_trace(path: str | pathlib.Path, events: Sequence[Event]) -> None:
    """Writes a trace file; open it at ui.perfetto.dev or chrome://tracing."""
    path = pathlib.Path(path)
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(to_chrome(events)) + "\n", encoding="utf-8")
    new.replace(path)


def read_trace(path: str | pathlib.Path) -> list[Event]:
    """Reads what `write_trace` wrote.

    Raises:
      ValueError: If the file is something else.
    """
    try:
        values = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        rows = [row for row in values["traceEvents"] if row["ph"] == "X"]
        return [_read_event(row) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a trace of `step3 afd trace`: {type(error).__name__} {error}") from None


def _read_event(row: Mapping[str, object]) -> Event:
    args = cast(Mapping[str, object], row["args"])
    lane, start, duration = args["lane"], float(cast(float, row["ts"])), float(cast(float, row["dur"]))
    if lane not in get_args(Lane):
        raise ValueError(f"unknown lane {lane!r}")
    numbers = [int(cast(int, args[name])) for name in ("step", "layer", "microbatch")]
    return Event(Stage(cast(Lane, lane), str(args["phase"]), *numbers), start / 1e6, (start + duration) / 1e6)
