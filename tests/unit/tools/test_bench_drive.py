"""The measurement of what driving other processes costs."""

from __future__ import annotations

import json
import pathlib

import pytest

from tools.bench_drive import main


@pytest.mark.slow
def test_all_sides_are_measured(tmp_path: pathlib.Path) -> None:
    """It starts three processes that import jax."""
    path = tmp_path / "found.json"
    assert main(["--workers", "2", "--rounds", "1", "--calls", "5", "--json", str(path)]) == 0
    [found] = json.loads(path.read_text())["drive"]
    for name in ("empty", "echo", "alone", "driven", "answered"):
        assert 0 < found[name]["median_us"] <= found[name]["p99_us"]
