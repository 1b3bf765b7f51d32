"""The latencies of a load as curves: the share of requests that waited at most this long."""

from __future__ import annotations

import importlib.util
import pathlib
from collections.abc import Sequence

import numpy as np

from step3_jax.bench.load import Record
from step3_jax.bench.serve import TARGETS, find_waits


def require_plot() -> None:
    """Raises ValueError if the plotting library is not installed: better known before the load than after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install 'step3-jax[plot]'")


def draw_waits(records: Sequence[Record], path: pathlib.Path, title: str) -> None:
    """Draws three curves side by side.

    Args:
      records: A load's records.
      path: The file; its suffix gives the format: .png, .svg, .pdf.
      title: Title above them.

    Raises:
      ValueError: Without matplotlib, or for a format that it does not write.
    """
    require_plot()
    from matplotlib.figure import Figure  # noqa: PLC0415  (an extra)

    waits = [one for one in map(find_waits, records) if one is not None]
    columns = {
        "ttft": [one.first for one in waits],
        "itl": [gap for one in waits for gap in one.between],
        "e2e": [one.whole for one in waits],
    }
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    figure.suptitle(title)
    for axes, (name, values) in zip(figure.subplots(1, len(columns), sharey=True), columns.items(), strict=True):
        axes.set_title(TARGETS[name])
        axes.set_xlabel("milliseconds")
        axes.grid(visible=True, alpha=0.3)
        if not values:
            continue
        axes.plot(np.sort(values), np.arange(1, len(values) + 1) / len(values) * 100)
        for percent in (50, 99):
            value = float(np.percentile(values, percent))
            axes.axvline(value, linestyle=":", linewidth=1, color="grey")
            axes.annotate(
                f"p{percent} {value:.3g}" if value < 1000 else f"p{percent} {value:.0f}",
                (value, 4),
                rotation=90,
                fontsize=8,
                ha="right",
            )
        axes.set_ylim(0, 100)
    figure.axes[0].set_ylabel("percent at most as long")
    figure.savefig(path)
