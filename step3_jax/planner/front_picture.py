"""Cost against speed as a picture: a line for attention and FFN on separate devices, one for devices that do both."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import math
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from step3_jax.planner.estimate import Judge
from step3_jax.planner.query import Found, Query, Speed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ENDINGS = (".svg", ".png")
# Distinguishable for colour-blind readers (Okabe and Ito).
_COLOURS = {True: "#0072b2", False: "#d55e00"}
_NAMES = {True: "attention and FFN apart (AFD)", False: "every device does both (EP, TP)"}
# Deployments to label on a line, and their minimum distance, as a factor of the cost.
_MAX_LABELS, _LABEL_FACTOR = 6, 1.25
# Points closer than this, as a logarithm, count as the same place.
_NEAR = 0.2
# Beyond this multiple of the lowest cost nothing is of interest, and the rest of the picture would be flat.
_MOST_TIMES_LEAST = 40.0


@dataclasses.dataclass(frozen=True)
class Front:
    """A line of the picture.

    Attributes:
      found: The front, the fastest first.
      is_apart: Whether attention and FFN are on separate devices.
      judge: The kind of times.
    """

    found: Sequence[Found]
    is_apart: bool
    judge: Judge


def check_picture(path: str) -> None:
    """Raises ValueError if a picture cannot be drawn there: better known before the search than after it."""
    if pathlib.Path(path).suffix.lower() not in ENDINGS:
        raise ValueError(f"--picture {path}: the name has to end in {' or '.join(ENDINGS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--picture needs matplotlib: pip install 'step3-jax[plot]'")


def draw_fronts(fronts: Sequence[Front], query: Query, best: Found | None, ending: str) -> bytes:
    """Draws fronts.

    Args:
      fronts: The lines. Those with the times that the search judges by are solid, others dashed.
      query: The query.
      best: Marked with a star; None if nothing meets the target.
      ending: ".svg" or ".png".

    Returns:
      The file.
    """
    import matplotlib as mpl  # noqa: PLC0415  (an extra)
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(9, 5.6), layout="constrained")
    axes = figure.add_subplot()
    shown = [one.speed(front.judge) for front in fronts for one in front.found]
    least = min((_cost(one, query) for one in shown), default=1.0)
    for front in fronts:
        _draw_front(axes, front, query, best, least * _MOST_TIMES_LEAST)
    users = 1 / query.target_s
    axes.axvline(users, color="grey", linewidth=1, linestyle=":")
    axes.annotate(
        f"target {query.target_s * 1e3:g} ms ",
        (users, 1),
        xycoords=("data", "axes fraction"),
        xytext=(-2, -4),
        textcoords="offset points",
        fontsize=8,
        color="dimgrey",
        ha="right",
        va="top",
    )
    if best is not None:
        speed = best.speed(query.judge)
        axes.plot(
            [speed.tokens_per_s_per_user],
            [_cost(speed, query)],
            marker="*",
            markersize=13,
            color="black",
            zorder=5,
            linestyle="",
            label=f"best within the target: {best.candidate.name} on {best.candidate.devices}",
        )
    # Speed and cost both count as ratios.
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(least / 1.3, least * _MOST_TIMES_LEAST)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(mpl.ticker.FuncFormatter(_label_number))
        axis.set_minor_formatter(mpl.ticker.FuncFormatter(_label_number))
    axes.tick_params(which="both", labelsize=8)
    axes.set_xlabel("tokens/s of one user")
    axes.set_ylabel("USD per million tokens" if query.has_prices else "device seconds per token")
    inventory = " + ".join(f"{pool.count} {pool.hardware.name}" for pool in query.pools)
    axes.set_title(f"Decoding on up to {inventory}, contexts of {query.contexts.text}", fontsize=11)
    axes.grid(visible=True, which="both", alpha=0.2)
    figure.legend(*axes.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=2, frameon=False)
    file = io.BytesIO()
    # Text as text, and the same bytes each time.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "step3"}):
        figure.savefig(file, format=ending[1:], dpi=150, metadata={"Date": None} if ending == ".svg" else {})
    return file.getvalue()


def _draw_front(axes: Axes, front: Front, query: Query, best: Found | None, top: float) -> None:
    shown = [one for one in front.found if _cost(one.speed(front.judge), query) <= top]
    if not shown:
        return
    is_judge = front.judge == query.judge
    speeds = [one.speed(front.judge) for one in shown]
    axes.plot(
        [one.tokens_per_s_per_user for one in speeds],
        [_cost(one, query) for one in speeds],
        color=_COLOURS[front.is_apart],
        linewidth=1.8 if is_judge else 1.2,
        linestyle="-" if is_judge else "--",
        marker="o" if is_judge else "",
        markersize=2.5,
        label=f"{_NAMES[front.is_apart]}, {front.judge}",
    )
    if is_judge:
        _name_deployments(axes, front, query, best, shown)


def _name_deployments(axes: Axes, front: Front, query: Query, best: Found | None, shown: Sequence[Found]) -> None:
    """Labels some deployments, starting with the cheapest, where the name changes; not on top of the star."""
    star = None if best is None else best.speed(query.judge)
    last, names = 0.0, [""]
    for one in reversed(shown):
        speed = one.speed(front.judge)
        cost, name = _cost(speed, query), one.candidate.name
        if len(names) > _MAX_LABELS or cost < last * _LABEL_FACTOR or name == names[-1]:
            continue
        if star is not None and _is_same_place(speed, star, query):
            continue
        last = cost
        names.append(name)
        axes.annotate(
            name,
            (speed.tokens_per_s_per_user, cost),
            xytext=(-5, 3) if front.is_apart else (5, -8),
            textcoords="offset points",
            fontsize=7,
            color=_COLOURS[front.is_apart],
            ha="right" if front.is_apart else "left",
        )


def _is_same_place(one: Speed, other: Speed, query: Query) -> bool:
    ratios = (one.tokens_per_s_per_user / other.tokens_per_s_per_user, _cost(one, query) / _cost(other, query))
    return all(abs(math.log(ratio)) < _NEAR for ratio in ratios)


def _cost(speed: Speed, query: Query) -> float:
    if query.has_prices and speed.usd_per_million_tokens is not None:
        return speed.usd_per_million_tokens
    return 1 / speed.tokens_per_s_per_device


def _label_number(value: float, _: float) -> str:
    """1, 2 and 5 times a power of ten."""
    return f"{value:g}" if f"{value:e}"[0] in "125" else ""
