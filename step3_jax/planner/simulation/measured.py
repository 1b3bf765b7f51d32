"""Measured stage times: from a file, or from the trace of a run."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence

from step3_jax.nearest import describe_known
from step3_jax.planner.simulation.jitter import Jitter
from step3_jax.timeline.event import LANES, Event, Lane
from step3_jax.timeline.trace import read_trace, steady_part

_HEAD, _SOURCE = "head_us", "source"


@dataclasses.dataclass(frozen=True)
class MeasuredStages:
    """Times of the four stages, in seconds.

    Attributes:
      samples_s: For each lane, equally likely samples: times, or evenly spaced quantiles of them.
      head_s: Mean time between two steps.
      source: Where they were measured.
    """

    samples_s: Mapping[Lane, tuple[float, ...]]
    head_s: float
    source: str

    def mean_s(self, lane: Lane) -> float:
        """Mean of a lane's times."""
        samples = self.samples_s[lane]
        return math.fsum(samples) / len(samples)

    def jitter(self) -> dict[Lane, Jitter]:
        """The spread of each lane; none if all times are 0."""
        return {lane: Jitter(samples=samples) for lane, samples in self.samples_s.items() if any(samples)}


def read_stages(path: str | pathlib.Path) -> MeasuredStages:
    """Reads measured times.

    Args:
      path: JSON with microseconds: {"attention_us": [...], "to_ffn_us": [...], "ffn_us": [...], "to_attention_us": [...]},
        optionally "head_us" (a number) and "source" (a text); or a trace of `step3 afd trace`, whose decode steps are used.

    Raises:
      ValueError: If the file is neither, or lacks a lane.
    """
    file = pathlib.Path(path).expanduser()
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise ValueError(f"{file} is not JSON, or not complete: {error}") from None
    if isinstance(values, dict) and "traceEvents" in values:
        return collect_stages(read_trace(file), str(file))
    if not isinstance(values, dict):
        raise ValueError(
            f"{file} holds {type(values).__name__}; an object with attention_us, ffn_us and the ways is needed"
        )
    known = [f"{lane}_us" for lane in LANES] + [_HEAD, _SOURCE]
    for key in values:
        if key not in known:
            raise ValueError(f"{file}: unknown key {key}{describe_known(key, known)}")
    samples = {lane: _read_samples(file, values, f"{lane}_us") for lane in LANES}
    head = values.get(_HEAD, 0.0)
    if not _is_time(head):
        raise ValueError(f"{file}: {_HEAD} is {head!r}; microseconds of at least 0 are needed")
    return MeasuredStages(samples, head / 1e6, str(values.get(_SOURCE, file)))


def collect_stages(events: Sequence[Event], source: str) -> MeasuredStages:
    """The times of a trace's decode steps.

    Args:
      events: Events of the trace.
      source: Its description.

    Raises:
      ValueError: If it has no decode step after its last prompt, or no stage of a lane.
    """
    events = steady_part(events)
    last = max(event.stage.layer for event in events if event.stage.lane == "ffn")
    samples: dict[Lane, list[float]] = {lane: [] for lane in LANES}
    heads: list[float] = []
    for event in events:
        length = event.end_s - event.start_s
        # The attention side's stage after the last layer is the head.
        (heads if event.stage.layer > last else samples[event.stage.lane]).append(length)
    missing = [lane for lane, times in samples.items() if not times]
    if missing:
        raise ValueError(f"{source}: the trace has no stage of {', '.join(missing)}")
    return MeasuredStages(
        {lane: tuple(times) for lane, times in samples.items()},
        math.fsum(heads) / len(heads) if heads else 0.0,
        f"{source}, {len(samples['ffn'])} stages of each lane",
    )


def _read_samples(file: pathlib.Path, values: Mapping[str, object], key: str) -> tuple[float, ...]:
    times = values.get(key)
    if not isinstance(times, list) or not times or not all(_is_time(one) for one in times):
        raise ValueError(f"{file}: {key} must be a list of microseconds, each at least 0, and have at least one")
    return tuple(one / 1e6 for one in times)


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
