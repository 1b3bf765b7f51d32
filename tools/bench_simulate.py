"""Events per second of `step3 plan simulate`, next to a plain loop over a heap in the same run.

    python -m tools.bench_simulate --json benchmarks/simulate.json

An event is a stage that ends on an instance: attention, FFN, or the flow from one instance to another. The plain loop
takes the next event of some chains from a heap and pushes its successor: no lanes, no links, nothing is kept. Rounds
are interleaved; times are processor time.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable

from step3_jax.planner.simulation.jitter import Draws, Jitter
from step3_jax.planner.simulation.lane import Pipeline, Work
from step3_jax.planner.simulation.simulate import simulate

NUM_LAYERS, NUM_MICROBATCHES, LINK_BYTES_S = 61, 3, 400e9
# Seconds and bytes of the stages: the report's 273 us, and what a micro-batch of 1,024 rows is.
ATTENTION_S, FFN_S, TO_FFN, TO_ATTENTION = 273e-6, 260e-6, 1024 * 7410, 1024 * 14336
SPREAD = Jitter(0.05)


def run_pipeline(num_attention: int, num_ffn: int, num_steps: int, *, has_jitter: bool, is_shared: bool) -> int:
    """Simulates decode steps and returns the number of events."""
    bandwidth = LINK_BYTES_S if is_shared else None
    scale = 1.0 if is_shared else 1 / LINK_BYTES_S
    pipeline = Pipeline(NUM_LAYERS, NUM_MICROBATCHES, num_attention, num_ffn, 5e-6, bandwidth, bandwidth)
    work = Work.constant(
        pipeline,
        attention_s=ATTENTION_S,
        ffn_s=FFN_S,
        to_ffn=TO_FFN * scale,
        to_attention=TO_ATTENTION * scale,
    )
    draws = Draws({"attention": SPREAD, "ffn": SPREAD} if has_jitter else {})
    return simulate(pipeline, work, num_steps, draws=draws).num_events


def run_plain(num_chains: int, num_events: int) -> int:
    """A heap of chains of events, in which each event pushes the next one of its chain."""
    times = (ATTENTION_S, 2e-5, FFN_S, 4e-5)
    heap = [(1e-6 * chain, 0, chain) for chain in range(num_chains)]
    pop, push = heapq.heappop, heapq.heappush
    for _ in range(num_events):
        now_s, lane, chain = pop(heap)
        push(heap, (now_s + times[lane], (lane + 1) % 4, chain))
    return num_events


def measure(num_events: int, rounds: int) -> dict[str, dict[str, float]]:
    """Events per second of each, the median of the rounds."""

    def steps(num_attention: int, num_ffn: int) -> int:
        each = num_attention + num_ffn + 2 * num_attention * num_ffn
        return max(1, num_events // (each * NUM_LAYERS * NUM_MICROBATCHES))

    runs: dict[str, Callable[[], int]] = {
        "plain heap, 3 chains": lambda: run_plain(3, num_events),
        "plain heap, 12 chains": lambda: run_plain(12, num_events),
        "1A1F, constant": lambda: run_pipeline(1, 1, steps(1, 1), has_jitter=False, is_shared=True),
        "1A1F, jitter": lambda: run_pipeline(1, 1, steps(1, 1), has_jitter=True, is_shared=False),
        "2A2F, jitter": lambda: run_pipeline(2, 2, steps(2, 2), has_jitter=True, is_shared=False),
        "2A2F, jitter, shared links": lambda: run_pipeline(2, 2, steps(2, 2), has_jitter=True, is_shared=True),
        "4A2F, jitter, shared links": lambda: run_pipeline(4, 2, steps(4, 2), has_jitter=True, is_shared=True),
        "16A2F, jitter, shared links": lambda: run_pipeline(16, 2, steps(16, 2), has_jitter=True, is_shared=True),
    }
    rates: dict[str, list[float]] = {name: [] for name in runs}
    # The first round warms up.
    for number in range(rounds + 1):
        for name, run in runs.items():
            begin = time.process_time()
            count = run()
            if number:
                rates[name].append(count / (time.process_time() - begin))
    plain = statistics.median(rates["plain heap, 12 chains"])
    return {
        name: {
            "events_per_s": round(statistics.median(values)),
            "least": round(min(values)),
            "most": round(max(values)),
            "over_plain": round(statistics.median(values) / plain, 2),
        }
        for name, values in rates.items()
    }


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description="Events a second of the simulated pipeline.")
    parser.add_argument(
        "--events", type=int, default=200_000, metavar="N", help="events per run (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the figures")
    arguments = parser.parse_args()
    conditions = {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "load": os.getloadavg(),
        "events": arguments.events,
        "rounds": arguments.rounds,
    }
    found = {"conditions": conditions, "runs": measure(arguments.events, arguments.rounds)}
    for name, row in found["runs"].items():
        print(f"{name:<30}{row['events_per_s']:>12,} events/s{row['over_plain']:>8.2f} of the plain heap's")
    if arguments.json is not None:
        new = arguments.json.with_name(arguments.json.name + ".new")
        new.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        new.replace(arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
