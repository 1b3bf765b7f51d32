"""A simulation's results for a reader: times per token, throughput, use of each side, bubbles."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

from step3_jax.planner.simulation.run import Run
from step3_jax.planner.simulation.service import ServiceRun

PERCENTILES = (50, 90, 99)


@dataclasses.dataclass(frozen=True)
class Spread:
    """A mean and percentiles, in seconds."""

    mean: float
    percentiles: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """The spread of some values; None without any."""
        if not values:
            return None
        found = np.percentile(np.asarray(values), PERCENTILES)
        return cls(math.fsum(values) / len(values), tuple(float(value) for value in found))


@dataclasses.dataclass(frozen=True)
class Use:
    """Shares of the time in which calls ran.

    Attributes:
      attention: Share in which the attention side worked; the rest are its bubbles.
      ffn: The same for the FFN side.
      to_ffn: Share in which the ways to the FFN side carried something.
      to_attention: The same for the ways back.
    """

    attention: float
    ffn: float
    to_ffn: float
    to_attention: float


@dataclasses.dataclass(frozen=True)
class Summary:
    """The results.

    Attributes:
      tpot: Time per output token: of the steps, or of each request between its first and its last token; None if no
        request had two.
      ttft: Time to the first token of each request; None for a batch that only decodes.
      tokens_per_s: Output tokens of all devices together.
      tokens_per_s_per_device: The same for one.
      use: Use of each lane, while calls ran.
      duration_s: Simulated time.
      num_steps: Decode steps.
      num_events: Stages that were simulated.
      num_requests: Requests that ended; 0 for a batch.
      num_rejected: Requests that were rejected.
      num_preemptions: How often a request lost its pages.
      num_truncated: Requests that ended early because they filled the cache.
      most_running: The most requests in slots at a time.
    """

    tpot: Spread | None
    ttft: Spread | None
    tokens_per_s: float
    tokens_per_s_per_device: float
    use: Use
    duration_s: float
    num_steps: int
    num_events: int
    num_requests: int = 0
    num_rejected: int = 0
    num_preemptions: int = 0
    num_truncated: int = 0
    most_running: int = 0


def summarise_batch(run: Run, *, num_sequences: int, num_devices: int) -> Summary:
    """Summarises decode steps with a batch that stays full.

    The time per token is that of the steps between the first and the last one: the pipeline fills in the first, and drains
    after the last.

    Args:
      run: A run of at least three steps.
      num_sequences: Sequences in the batch.
      num_devices: Devices of both sides.

    Raises:
      ValueError: If there are fewer steps.
    """
    ends = run.step_ends_s()
    if len(ends) < 3:
        raise ValueError(f"{len(ends)} steps are simulated; at least 3 are needed to see one of a full pipeline")
    steps = [after - before for before, after in itertools.pairwise(ends[:-1])]
    length = run.end_s - run.start_s
    # Each step of the middle is one token of each sequence.
    rate = num_sequences * len(steps) / math.fsum(steps)
    return Summary(
        tpot=Spread.of(steps),
        ttft=None,
        tokens_per_s=rate,
        tokens_per_s_per_device=rate / num_devices,
        use=Use(
            math.fsum(run.attention_busy_s) / len(run.attention_busy_s) / length,
            math.fsum(run.ffn_busy_s) / len(run.ffn_busy_s) / length,
            run.to_ffn_busy_s / length,
            run.to_attention_busy_s / length,
        ),
        duration_s=length,
        num_steps=len(ends),
        num_events=run.num_events,
    )


def summarise_service(run: ServiceRun, *, num_devices: int) -> Summary:
    """Summarises requests.

    Args:
      run: A service's run.
      num_devices: Devices of both sides.
    """
    tpot, ttft, num_tokens = [], [], 0
    for one in run.requests:
        num_tokens += one.num_generated
        if one.first_s is None or one.end_s is None:
            continue
        ttft.append(one.first_s - one.arrival_s)
        if one.num_generated > 1:
            tpot.append((one.end_s - one.first_s) / (one.num_generated - 1))
    length, calling = run.end_s or math.inf, run.calling_s or math.inf
    return Summary(
        tpot=Spread.of(tpot),
        ttft=Spread.of(ttft),
        tokens_per_s=num_tokens / length,
        tokens_per_s_per_device=num_tokens / length / num_devices,
        use=Use(
            run.attention_busy_s / calling,
            run.ffn_busy_s / calling,
            run.to_ffn_busy_s / calling,
            run.to_attention_busy_s / calling,
        ),
        duration_s=run.end_s,
        num_steps=run.num_steps,
        num_events=run.num_events,
        num_requests=len(run.requests),
        num_rejected=run.num_rejected,
        num_preemptions=run.num_preemptions,
        num_truncated=run.num_truncated,
        most_running=run.most_running,
    )


def to_lines(summary: Summary) -> list[str]:
    """The summary as a table."""
    use = summary.use
    lines = [f"{'ms':<26}{'mean':>10}" + "".join(f"{f'p{one}':>10}" for one in PERCENTILES)]
    for name, spread in (("time per output token", summary.tpot), ("time to first token", summary.ttft)):
        if spread is not None:
            values = (spread.mean, *spread.percentiles)
            lines.append(f"{name:<26}" + "".join(f"{1e3 * value:>10,.2f}" for value in values))
    lines.append(
        f"{summary.tokens_per_s:,.0f} tokens/s, {summary.tokens_per_s_per_device:,.0f} a device; "
        f"{summary.num_steps:,} steps in {summary.duration_s:,.2f} s, {summary.num_events:,} events"
    )
    if summary.num_requests or summary.num_rejected:
        lines.append(
            f"{summary.num_requests:,} requests ended, {summary.most_running:,} at a time at most; {summary.num_rejected:,} "
            f"turned away, {summary.num_preemptions:,} preemptions, {summary.num_truncated:,} ended early for want of cache"
        )
    lines.append(
        f"in use: attention {use.attention:.1%}, FFN {use.ffn:.1%}, way to FFN {use.to_ffn:.1%}, way back "
        f"{use.to_attention:.1%}; bubbles: attention {1 - use.attention:.1%}, FFN {1 - use.ffn:.1%}"
    )
    return lines


def to_dict(summary: Summary) -> dict[str, object]:
    """The summary as a JSON object; times in milliseconds."""

    def spread(one: Spread | None) -> dict[str, float] | None:
        if one is None:
            return None
        named = {f"p{name}": 1e3 * value for name, value in zip(PERCENTILES, one.percentiles, strict=True)}
        return {"mean": 1e3 * one.mean} | named

    use = dataclasses.asdict(summary.use)
    return {
        "tpot_ms": spread(summary.tpot),
        "ttft_ms": spread(summary.ttft),
        "tokens_per_s": summary.tokens_per_s,
        "tokens_per_s_per_device": summary.tokens_per_s_per_device,
        "use": use,
        "bubbles": {name: 1 - use[name] for name in ("attention", "ffn")},
        "duration_s": summary.duration_s,
        "steps": summary.num_steps,
        "events": summary.num_events,
        "requests": summary.num_requests,
        "rejected": summary.num_rejected,
        "preemptions": summary.num_preemptions,
        "truncated": summary.num_truncated,
        "most_running": summary.most_running,
    }
