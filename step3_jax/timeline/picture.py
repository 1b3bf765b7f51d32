"""The timeline of a trace as a picture, after Figure 7 of the paper (arXiv 2507.19427): one row per lane, one colour per
micro-batch, the layer's number in each box. SVG, written by hand, so that no plotting library is needed.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from xml.sax.saxutils import escape

from step3_jax.timeline.event import Event
from step3_jax.timeline.trace import LANE_NAMES, measure, steady_part

# One colour per micro-batch; distinguishable for colour-blind readers (Okabe and Ito).
COLOURS = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7")
_LEFT, _RIGHT, _TOP, _ROW, _GAP, _BOTTOM = 130, 20, 58, 34, 10, 46
_WIDTH = 1200
# Width of a character in a box.
_CHARACTER = 7
_FONT = "font-family='DejaVu Sans, Helvetica, Arial, sans-serif'"


def draw(events: Sequence[Event], title: str) -> str:
    """An SVG picture of some events.

    Args:
      events: What is shown, from the first start to the last end; see `pick_window`.
      title: Title above the picture.

    Raises:
      ValueError: If there are no events.
    """
    if not events:
        raise ValueError("there is nothing to draw: the trace has no events")
    first, last = min(event.start_s for event in events), max(event.end_s for event in events)
    scale = (_WIDTH - _LEFT - _RIGHT) / max(last - first, 1e-9)
    height = _TOP + len(LANE_NAMES) * (_ROW + _GAP) + _BOTTOM
    lines = [
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{_WIDTH}' height='{height}' viewBox='0 0 {_WIDTH} {height}'>",
        f"<rect width='{_WIDTH}' height='{height}' fill='white'/>",
        _text(_LEFT, 24, title, size=15, weight="bold"),
    ]
    count = 1 + max(event.stage.microbatch for event in events)
    # The attention side has one more task after the last layer.
    num_layers = max((event.stage.layer for event in events if event.stage.lane == "ffn"), default=0)
    for index in range(count):
        place = _LEFT + index * 130
        lines += [_box(place, 34, 14, 14, index), _text(place + 20, 46, f"micro-batch D{index + 1}", size=12)]
    tops = {lane: _TOP + number * (_ROW + _GAP) for number, lane in enumerate(LANE_NAMES)}
    for lane, top in tops.items():
        lines.append(_text(_LEFT - 10, top + _ROW / 2 + 4, LANE_NAMES[lane], size=12, anchor="end"))
        lines.append(f"<rect x='{_LEFT}' y='{top}' width='{_WIDTH - _LEFT - _RIGHT}' height='{_ROW}' fill='#f2f2f2'/>")
    for event in events:
        left, width = _LEFT + (event.start_s - first) * scale, max((event.end_s - event.start_s) * scale, 0.6)
        top = tops[event.stage.lane]
        lines.append(_box(left, top, width, _ROW, event.stage.microbatch, str(event.stage)))
        label = "head" if event.stage.layer > num_layers else str(event.stage.layer)
        if width >= _CHARACTER * len(label) + 6:
            lines.append(_text(left + width / 2, top + _ROW / 2 + 4, label, size=11, anchor="middle"))
    lines += _axis(last - first, scale, height - _BOTTOM + 4)
    return "\n".join([*lines, "</svg>"]) + "\n"


def pick_window(events: Sequence[Event], num_ticks: int = 24) -> list[Event]:
    """Events from the middle of a trace's steady part, where the pipeline is full: `num_ticks` layers of a micro-batch.

    Raises:
      ValueError: If there is no such part.
    """
    events = steady_part(events)
    ffn = sorted((event for event in events if event.stage.lane == "ffn"), key=_start)
    begin = max(0, (len(ffn) - num_ticks) // 2)
    picked = ffn[begin : begin + num_ticks]
    first, last = picked[0].start_s, picked[-1].end_s
    return [event for event in events if event.end_s > first and event.start_s < last]


def write_picture(path: str | pathlib.Path, events: Sequence[Event], *, title: str, num_ticks: int = 24) -> None:
    """Draws the middle of a trace.

    Args:
      path: An SVG file.
      events: The whole trace.
      title: Title above the picture; the pipeline's efficiency is appended.
      num_ticks: Number of layers of a micro-batch to show.

    Raises:
      ValueError: If the path does not end in .svg, or the trace has no decode step.
    """
    path = pathlib.Path(path)
    if path.suffix != ".svg":
        raise ValueError(f"{path}: the picture is an SVG file; give a name that ends in .svg")
    found = measure(events)
    text = f"{title}: {found.tick_s * 1e3:.2f} ms a layer and micro-batch, efficiency {found.efficiency:.2f}"
    picture = draw(pick_window(events, num_ticks), text)
    new = path.with_name(path.name + ".new")
    new.write_text(picture, encoding="utf-8")
    new.replace(path)


def _start(event: Event) -> float:
    return event.start_s


def _box(left: float, top: float, width: float, height: float, microbatch: int, hint: str = "") -> str:
    colour = COLOURS[microbatch % len(COLOURS)]
    shape = (
        f"<rect x='{left:.2f}' y='{top:.2f}' width='{width:.2f}' height='{height}' fill='{colour}' stroke='white' "
        "stroke-width='0.8'"
    )
    return f"{shape}><title>{escape(hint)}</title></rect>" if hint else f"{shape}/>"


def _text(left: float, top: float, text: str, *, size: int, anchor: str = "start", weight: str = "normal") -> str:
    return (
        f"<text x='{left:.2f}' y='{top:.2f}' {_FONT} font-size='{size}' font-weight='{weight}' text-anchor='{anchor}' "
        f"fill='#222'>{escape(text)}</text>"
    )


def _axis(length_s: float, scale: float, top: float) -> list[str]:
    """Marks at round times."""
    step = next(
        (base * 10.0**power for power in range(-7, 6) for base in (1, 2, 5) if length_s / (base * 10.0**power) <= 10),
        length_s,
    )
    lines = [f"<line x1='{_LEFT}' y1='{top}' x2='{_WIDTH - _RIGHT}' y2='{top}' stroke='#888'/>"]
    for mark in range(int(length_s / step) + 1):
        left = _LEFT + mark * step * scale
        lines.append(f"<line x1='{left:.2f}' y1='{top}' x2='{left:.2f}' y2='{top + 5}' stroke='#888'/>")
        lines.append(_text(left, top + 19, f"{mark * step * 1e3:g}", size=11, anchor="middle"))
    return [*lines, _text(_LEFT - 10, top + 19, "ms", size=11, anchor="end")]
