"""How far a simulated tick is from this project's own, on CPU processes; the figures of docs/planning.md."""

from __future__ import annotations

import json
import pathlib
import statistics

import pytest

from step3_jax.layout.schedule import Schedule
from step3_jax.planner.simulation.lockstep import simulate_item_s

ROOT = pathlib.Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(("count", "error"), [(1, -0.04), (2, -0.08), (3, -0.14), (4, -0.29)])
def test_a_tick_of_executor_program_is_simulated_from_what_its_parts_took(count: int, error: float) -> None:
    """Calls of each role alone, and exchanges alone, of a quiet machine; within 15 %, but for four micro-batches."""
    found = json.loads((ROOT / "benchmarks" / "afd.json").read_text())
    num_layers, num_steps = found["conditions"]["layers"], found["conditions"]["steps"]

    def ticks(name: str, num_microbatches: int) -> list[float]:
        return [call_s / (num_layers * num_microbatches * num_steps) for call_s in found["times_s"][name]]

    # Each role alone was timed with three micro-batches in flight.
    attention_s, ffn_s, exchange_s = (ticks(name, 3) for name in ("attention", "ffn", "exchange"))
    simulated_s = simulate_item_s(
        Schedule(num_layers, count), attention_s=attention_s, ffn_s=ffn_s, exchange_s=exchange_s
    )
    measured_s = statistics.fmean(ticks(f"pipelined {count}", count))
    assert simulated_s / measured_s - 1 == pytest.approx(error, abs=0.01)
