"""Sends requests to a service, at a rate or with a given concurrency, and records when their pieces arrive."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from step3_jax.client import ServiceClient, ServiceError


@dataclasses.dataclass
class Record:
    """The outcome of one request. Times are seconds since the start of the load.

    Attributes:
      due_s: When it should be sent. Latencies count from here, so that a client that falls behind hides nothing.
      sent_s: When it was sent.
      piece_s: When each piece with text arrived.
      end_s: When it ended.
      prompt_tokens: As the service counts them; 0 if it does not.
      output_tokens: Likewise; the number of pieces if it does not count them.
      error: None for a complete answer, else the kind of `ServiceError`.
    """

    due_s: float
    sent_s: float = 0.0
    piece_s: list[float] = dataclasses.field(default_factory=list)
    end_s: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Load:
    """How requests are sent: exactly one of the two is given.

    Attributes:
      concurrency: This many at a time; the next is sent when one ends (closed loop).
      rate: This many per second, at random times of a Poisson process, independent of the others (open loop).
      seed: Seed of the times.
    """

    concurrency: int | None = None
    rate: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.concurrency is None) == (self.rate is None):
            raise ValueError("give either a number of requests at a time or a rate")
        if self.concurrency is not None and self.concurrency < 1:
            raise ValueError(f"{self.concurrency} requests at a time; at least 1 is needed")
        if self.rate is not None and not 0 < self.rate < float("inf"):
            raise ValueError(f"a rate of {self.rate:g} requests per second; more than 0 is needed")

    def draw_moments(self, count: int) -> list[float]:
        """When each of `count` requests is due, in an open loop."""
        gaps = np.random.default_rng(self.seed).exponential(1 / (self.rate or 1.0), count)
        return np.cumsum(gaps).tolist()


async def run_load(
    client: ServiceClient,
    path: str,
    bodies: Sequence[Mapping[str, object]],
    load: Load,
    *,
    tell: Callable[[Record], None] = lambda _: None,
) -> list[Record]:
    """Sends all requests, each once.

    Args:
      client: The service.
      path: `chat/completions` or `completions`.
      bodies: The requests.
      load: When they are sent.
      tell: Called as each ends.

    Returns:
      A record of each, in order.
    """
    begin = time.perf_counter()
    moments = [0.0] * len(bodies) if load.rate is None else load.draw_moments(len(bodies))
    records = [Record(moment) for moment in moments]

    async def send(record: Record, body: Mapping[str, object]) -> None:
        record.sent_s = time.perf_counter() - begin
        await _receive(client, path, body, record, begin)
        tell(record)

    if load.rate is None:
        waiting = iter(zip(records, bodies, strict=True))

        async def send_in_turn() -> None:
            for record, body in waiting:
                record.due_s = time.perf_counter() - begin
                await send(record, body)

        await asyncio.gather(*[send_in_turn() for _ in range(load.concurrency or 1)])
        return records
    async with asyncio.TaskGroup() as group:
        for record, body in zip(records, bodies, strict=True):
            await asyncio.sleep(record.due_s - (time.perf_counter() - begin))
            group.create_task(send(record, body))
    return records


async def _receive(client: ServiceClient, path: str, body: Mapping[str, object], record: Record, begin: float) -> None:
    try:
        async with contextlib.aclosing(client.stream(path, body)) as chunks:
            async for chunk in chunks:
                if _has_output(chunk):
                    record.piece_s.append(time.perf_counter() - begin)
                usage = chunk.get("usage")
                if isinstance(usage, dict):
                    record.prompt_tokens = int(usage.get("prompt_tokens") or 0)
                    record.output_tokens = int(usage.get("completion_tokens") or 0)
    except ServiceError as error:
        record.error = error.kind
    record.end_s = time.perf_counter() - begin
    record.output_tokens = record.output_tokens or len(record.piece_s)


def _has_output(chunk: Mapping[str, object]) -> bool:
    choices = chunk.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else {}
    delta = choice.get("delta") or choice
    return any(delta.get(key) for key in ("content", "text", "reasoning_content", "reasoning", "tool_calls"))
