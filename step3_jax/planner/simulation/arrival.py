"""When requests arrive, and how long they are: at a rate, from a trace, or as soon as a previous one has ended."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from step3_jax.planner.trace_file import TraceRequest


@dataclasses.dataclass(frozen=True)
class Arrivals:
    """A load.

    Attributes:
      requests: In the order of arrival; those of an open loop have an `arrival_s`.
      concurrency: Requests at a time in a closed loop, where the next one arrives when one has ended; None for an open
        loop.
    """

    requests: Sequence[TraceRequest]
    concurrency: int | None = None

    def __post_init__(self) -> None:
        if not self.requests:
            raise ValueError("there are no requests to simulate; at least 1 is needed")
        if self.concurrency is not None and self.concurrency < 1:
            raise ValueError(f"{self.concurrency} requests at a time; at least 1 is needed")
        if self.concurrency is None and any(one.arrival_s is None for one in self.requests):
            raise ValueError("an open loop needs the time of each request: give a rate, or times in the trace")


def repeat_lengths(prompt_tokens: int, output_tokens: int, count: int) -> list[TraceRequest]:
    """Equal requests.

    Raises:
      ValueError: If a number is below 1.
    """
    for name, value in (("prompt tokens", prompt_tokens), ("output tokens", output_tokens), ("requests", count)):
        if value < 1:
            raise ValueError(f"{value} {name}; at least 1 is needed")
    return [TraceRequest(prompt_tokens, output_tokens)] * count


def arrive_at_rate(requests: Sequence[TraceRequest], rate: float, seed: int) -> Arrivals:
    """Requests that arrive at random times.

    Args:
      requests: Their lengths, in order.
      rate: Requests per second, on average: a Poisson process.
      seed: Seed of the times between them.

    Raises:
      ValueError: If the rate is not above 0.
    """
    if not (math.isfinite(rate) and rate > 0):
        raise ValueError(f"{rate:g} requests per second; a number above 0 is needed")
    gaps = np.random.default_rng([seed, 1]).exponential(1 / rate, len(requests))
    times = np.cumsum(gaps).tolist()
    return Arrivals([dataclasses.replace(one, arrival_s=time) for one, time in zip(requests, times, strict=True)])
