"""How far a simulated tick is from this project's own, on CPU processes; the figures of docs/planning.md."""

from __future__ import annotations

import json
import pathlib

import pytest

from tools.bench_afd_ticks import simulate_us

ROOT = pathlib.Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("count", "alone", "beside"), [(1, 0.04, -0.01), (2, 0.04, 0.05), (3, -0.10, -0.08), (4, -0.04, -0.04)]
)
def test_a_tick_of_executor_program_is_simulated_from_what_its_parts_took(
    count: int, alone: float, beside: float
) -> None:
    """Each role's items alone and beside the other's, and exchanges, as measured on a quiet machine."""
    found = json.loads((ROOT / "benchmarks" / "afd.json").read_text())
    measured_us = found["microbatches"][str(count)]["pipelined"]["mean_us"]
    for where, error in (("", alone), ("_beside", beside)):
        assert simulate_us(found, count, where) / measured_us - 1 == pytest.approx(error, abs=0.02)
