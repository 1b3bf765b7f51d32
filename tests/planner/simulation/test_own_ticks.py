"""How far a simulated tick is from this project's own, on CPU processes; the figures of docs/planning.md."""

from __future__ import annotations

import json
import pathlib
import statistics

import pytest

from step3_jax.layout.schedule import Schedule
from step3_jax.planner.simulation.closed_form import StageTimes
from step3_jax.planner.simulation.jitter import Draws, Jitter
from step3_jax.planner.simulation.lockstep import simulate_lockstep

ROOT = pathlib.Path(__file__).resolve().parents[3]


def simulated_item_s(
    schedule: Schedule, attention: list[float], ffn: list[float], exchange: list[float], num_steps: int = 300
) -> float:
    """Seconds of a layer of one micro-batch, each stage drawn from its times; gloo's exchange on the cores that compute."""
    stages = StageTimes(*(statistics.fmean(times) for times in (attention, exchange, ffn, exchange)))
    draws = Draws(
        {
            "attention": Jitter(samples=tuple(attention)),
            "ffn": Jitter(samples=tuple(ffn)),
            "to_ffn": Jitter(samples=tuple(exchange)),
        }
    )
    ends = simulate_lockstep(schedule, stages, num_steps, draws=draws, is_exchange_on_core=True).step_ends_s()
    return (ends[-2] - ends[0]) / (num_steps - 2) / (schedule.num_layers * schedule.num_microbatches)


@pytest.mark.parametrize(("count", "error"), [(1, -0.04), (2, -0.08), (3, -0.14), (4, -0.29)])
def test_a_tick_of_executor_program_is_simulated_from_what_its_parts_took(count: int, error: float) -> None:
    """Calls of each role alone, and exchanges alone, of a quiet machine; within 15 %, but for four micro-batches."""
    found = json.loads((ROOT / "benchmarks" / "afd.json").read_text())
    num_layers, num_steps = found["conditions"]["layers"], found["conditions"]["steps"]

    def ticks(name: str, num_microbatches: int) -> list[float]:
        return [call_s / (num_layers * num_microbatches * num_steps) for call_s in found["times_s"][name]]

    # Each role alone was timed with three micro-batches in flight.
    parts = [ticks(name, 3) for name in ("attention", "ffn", "exchange")]
    simulated_s = simulated_item_s(Schedule(num_layers, count), *parts)
    measured_s = statistics.fmean(ticks(f"pipelined {count}", count))
    assert simulated_s / measured_s - 1 == pytest.approx(error, abs=0.01)
