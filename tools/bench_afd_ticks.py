"""Single ticks of AFD's executor `program` on one CPU, next to those that the planner simulates from their parts.

    python -m tools.bench_afd_ticks --json benchmarks/afd.json

The two processes, the model and the sizes are those of `tools.bench_afd`. Measured alternately, for 1 to 4
micro-batches:

- alone: a role's decode program without the exchange, while the other core rests: once without other timing, which
  gives the mean of an item, and once with the time of each tick, which gives the distribution (noting a time takes a
  part of a millisecond);
- beside: the same while the other role runs its own on the other core;
- exchange: the two roles alternately compute products of a few milliseconds and exchange after each; the time is what
  that takes beyond both roles' products without the exchange. (With nothing computed a quarter of the exchanges take 4
  ms, in which the system wakes an idle process);
- pipelined: the complete decode program, of which only the total is timed.

The times are written as equally spaced quantiles, with their mean. From those of the parts, alone and beside each
other, a tick is simulated (`planner/simulation/lockstep.py`) and shown next to the pipelined one. The machine must
have two cores to itself: where other work runs, an exchange alone takes longer than a complete tick.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback, multihost_utils
from jaxtyping import Array, UInt8

from step3_jax.afd.program.wire import Wire
from step3_jax.distributed import initialise_distributed
from step3_jax.layout.schedule import Schedule
from step3_jax.planner.simulation.lockstep import simulate_item_s
from tools import bench_afd
from tools.bench_afd import MICROBATCHES, Rank, SilentWire, add_sizes, start_ranks

NUM_QUANTILES = 50


class Clock:
    """Records when values have been computed."""

    def __init__(self) -> None:
        self._times: list[float] = []

    def stamp(self, slot: UInt8[Array, " slot"]) -> UInt8[Array, " slot"]:
        """The same bytes; the time is recorded once all of them are there, before anything that needs the result."""

        def note(_: object, last: np.ndarray) -> np.ndarray:
            self._times.append(time.perf_counter())
            return last

        last = io_callback(note, jax.ShapeDtypeStruct((), jnp.uint8), jnp.sum(slot, dtype=jnp.uint8), slot[-1])
        return slot.at[-1].set(last)

    def take(self) -> list[float]:
        """The times since the last call."""
        times, self._times = self._times, []
        return times


def stamped(base: type[Wire], clock: Clock) -> type[Wire]:
    """A wire that records each exchange when its bytes are ready to be sent."""

    class StampedWire(base):  # type: ignore[misc, valid-type]
        def _swap(self, slot: UInt8[Array, " slot"]) -> UInt8[Array, " slot"]:
            return super()._swap(clock.stamp(slot))

    return StampedWire


class TickRank:
    """One of the two processes, with the times of single ticks."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._rank = Rank(arguments)
        self._clock = Clock()
        self.is_attention = jax.process_index() == 0

    def pipelined(self, count: int) -> Callable[[], list[float]]:
        """The complete decode call; its seconds for each item."""
        run, items = self._rank.pipelined(count), self._arguments.layers * count * self._arguments.steps

        def timed() -> list[float]:
            begin = time.perf_counter()
            run()
            return [(time.perf_counter() - begin) / items]

        return timed

    def products(self, *, is_exchanging: bool) -> Callable[[], list[float]]:
        """Both roles' products alternately, with or without exchanges; the seconds of an exchange with its product."""
        num_ticks = self._arguments.layers * 3 * self._arguments.steps
        with contextlib.nullcontext() if is_exchanging else mock.patch.object(Wire, "_swap", lambda _, slot: slot):
            run = self._rank.exchange(num_ticks, computes_in_turn=True)
            run()

        def timed() -> list[float]:
            begin = time.perf_counter()
            run()
            return [(time.perf_counter() - begin) / num_ticks]

        return timed

    def alone(self, count: int) -> Callable[[], list[float]]:
        """Seconds of each item of this role without the exchange; their mean is that of a run without noted times."""
        run, noted_run, wire = self._rank.alone(count), self._rank.alone(count), stamped(SilentWire, self._clock)
        schedule, steps = Schedule(self._arguments.layers, count), self._arguments.steps
        item = schedule.attention_item if self.is_attention else schedule.ffn_item

        def timed() -> list[float]:
            begin = time.perf_counter()
            run()
            mean_s = (time.perf_counter() - begin) / (steps * self._arguments.layers * count)
            self._clock.take()
            # Only the first run, which compiles, looks at it.
            with mock.patch.object(bench_afd, "SilentWire", wire):
                noted_run()
            times = self._clock.take()[: steps * schedule.num_ticks]
            noted = [
                after - before
                for tick, (before, after) in enumerate(itertools.pairwise(times), start=1)
                if item(tick % schedule.num_ticks) is not None
            ]
            return [mean_s / statistics.fmean(noted) * one for one in noted]

        return timed


def run_rank(arguments: argparse.Namespace) -> None:
    """What each of the two processes does; process 0 prints the result."""
    own_core = sorted(os.sched_getaffinity(0))[int(os.environ["STEP3_PROCESS_ID"]) % len(os.sched_getaffinity(0))]
    os.sched_setaffinity(0, {own_core})
    initialise_distributed()
    rank = TickRank(arguments)
    runs: dict[str, Callable[[], list[float]]] = {
        "products exchanged": rank.products(is_exchanging=True),
        "products": rank.products(is_exchanging=False),
    }
    for count in MICROBATCHES:
        runs[f"pipelined {count}"] = rank.pipelined(count)
        own = rank.alone(count)
        for name in ("attention", "ffn"):
            runs[f"{name} {count}"] = own if (name == "attention") == rank.is_attention else _rest
        runs[f"beside {count}"] = own
    times: dict[str, list[float]] = {name: [] for name in runs}
    # The first round compiles.
    for number in range(arguments.rounds + 1):
        for name, run in runs.items():
            multihost_utils.sync_global_devices(f"{name} {number}")
            found = run()
            times[name] += found if number else []
    # The FFN side's times, as text of one length, to process 0.
    own_text = json.dumps({name: _quantiles(values) for name, values in times.items() if values}).encode()
    padded = np.zeros(2**20, np.uint8)
    padded[: len(own_text)] = np.frombuffer(own_text, np.uint8)
    texts = multihost_utils.process_allgather(padded)
    if rank.is_attention:
        sides = [json.loads(bytes(text).rstrip(b"\0")) for text in np.asarray(texts)]
        print("answer", json.dumps(summarise(*sides, arguments)), flush=True)


def _rest() -> list[float]:
    return []


def _quantiles(values: list[float]) -> dict[str, object]:
    """Quantiles at the middles of equal parts, and the mean, in microseconds."""
    places = (np.arange(NUM_QUANTILES) + 0.5) / NUM_QUANTILES
    return {
        "mean_us": round(1e6 * statistics.fmean(values), 2),
        "median_us": round(1e6 * statistics.median(values), 2),
        "count": len(values),
        "quantiles_us": [round(1e6 * value, 1) for value in np.quantile(values, places).tolist()],
    }


def summarise(
    attention: dict[str, dict[str, object]], ffn: dict[str, dict[str, object]], arguments: argparse.Namespace
) -> dict[str, object]:
    """What both sides have measured."""
    return {
        "conditions": bench_afd.describe_conditions(arguments),
        "exchange_us": _exchange_us(attention, ffn),
        "microbatches": {
            str(count): {
                "pipelined": attention[f"pipelined {count}"],
                "attention": attention[f"attention {count}"],
                "ffn": ffn[f"ffn {count}"],
                "attention_beside": attention[f"beside {count}"],
                "ffn_beside": ffn[f"beside {count}"],
            }
            for count in MICROBATCHES
        },
    }


def _exchange_us(*sides: Mapping[str, Mapping[str, Any]]) -> float:
    """What an exchange takes: all of them with both sides' products, less the products, of which each side has half.

    Of medians over rounds, since a disturbed round can make the difference negative; never below 0.1, the last digit kept.
    """
    exchanged = max(side["products exchanged"]["median_us"] for side in sides)
    return max(0.1, round(exchanged - sum(side["products"]["median_us"] for side in sides), 1))


def simulate_us(found: Mapping[str, Any], count: int, where: str = "") -> float:
    """Microseconds of a layer of one micro-batch, simulated from what was measured of its parts.

    Args:
      found: What `summarise` returns.
      count: Micro-batches in flight.
      where: The roles' times: "" for those of each alone, "_beside" for those beside the other.
    """
    row = found["microbatches"][str(count)]
    return 1e6 * simulate_item_s(
        Schedule(found["conditions"]["layers"], count),
        attention_s=_seconds(row[f"attention{where}"]),
        ffn_s=_seconds(row[f"ffn{where}"]),
        exchange_s=[found["exchange_us"] / 1e6],
    )


def show(found: Mapping[str, Any]) -> None:
    """Prints what was measured and what is simulated from it."""
    print(f"ms per layer of one micro-batch; an exchange {found['exchange_us'] / 1e3:.2f}")
    print(
        "micro-batches  measured   attention       FFN  simulated  error   beside: attention       FFN  simulated  error"
    )
    for count, row in found["microbatches"].items():
        measured, cells = row["pipelined"]["mean_us"], []
        for where in ("", "_beside"):
            attention, ffn = row[f"attention{where}"], row[f"ffn{where}"]
            simulated = simulate_us(found, int(count), where)
            cells.append(
                f"{attention['mean_us'] / 1e3:10.2f}{ffn['mean_us'] / 1e3:10.2f}{simulated / 1e3:11.2f}"
                f"{simulated / measured - 1:7.0%}"
            )
        print(f"{count:>13}{measured / 1e3:10.2f}  {cells[0]}          {cells[1]}")


def _seconds(times: Mapping[str, Any]) -> list[float]:
    """Quantiles with the mean of all times: the mean of the quantiles would miss the longest ones."""
    quantiles = times["quantiles_us"]
    scale = times["mean_us"] / statistics.fmean(quantiles) / 1e6
    return [scale * value for value in quantiles]


def main() -> int:
    """Starts both processes and writes what they found."""
    parser = argparse.ArgumentParser(description="Single ticks of AFD's executor program on two cores.")
    add_sizes(parser)
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the figures")
    arguments = parser.parse_args()
    if os.environ.get("STEP3_PROCESS_ID"):
        run_rank(arguments)
        return 0
    found = start_ranks("tools.bench_afd_ticks", arguments.timeout)
    if found is None:
        return 1
    if arguments.json is not None:
        bench_afd.write_json(arguments.json, found)
    show(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
