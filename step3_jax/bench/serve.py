"""The figures of a load on a service: throughput, percentiles of latencies, and goodput."""

from __future__ import annotations

import collections
import dataclasses
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from step3_jax.bench.load import Record

PERCENTILES = (50, 90, 99)
# The latencies, and their names in a target.
TARGETS = {
    "ttft": "first token",
    "itl": "between tokens",
    "tpot": "each output token",
    "e2e": "end to end",
}


@dataclasses.dataclass(frozen=True)
class Waits:
    """The latencies of one request, in milliseconds.

    Attributes:
      first: Time to first token, from when the request was due.
      between: Times between two pieces of the answer; a piece may hold several tokens.
      each: Mean time of each token after the first; None for answers of one.
      whole: From when the request was due to its end.
    """

    first: float
    between: Sequence[float]
    each: float | None
    whole: float


def find_waits(record: Record) -> Waits | None:
    """Latencies of a request; None if it was not answered."""
    if record.error is not None or not record.piece_s:
        return None
    span = record.piece_s[-1] - record.piece_s[0]
    return Waits(
        first=(record.piece_s[0] - record.due_s) * 1e3,
        between=(np.diff(record.piece_s) * 1e3).tolist(),
        each=span / (record.output_tokens - 1) * 1e3 if record.output_tokens > 1 else None,
        whole=(record.end_s - record.due_s) * 1e3,
    )


def summarise(records: Sequence[Record], targets_ms: Mapping[str, float]) -> dict[str, object]:
    """Figures of one load.

    Args:
      records: Records of all its requests, including refused ones.
      targets_ms: For some of the `TARGETS`, the longest that is good; for "itl" the request's 99th percentile counts.

    Returns:
      Counts, rates over the time from the first request to the last end, errors by kind, rows of percentiles, and with
      targets the requests per second that met them all.
    """
    duration_s = max((one.end_s for one in records), default=0.0) - min((one.sent_s for one in records), default=0.0)
    rate = 1 / duration_s if duration_s > 0 else 0.0
    waits = [one for one in map(find_waits, records) if one is not None]
    errors = collections.Counter(record.error for record in records if record.error is not None)
    empty = sum(record.error is None and not record.piece_s for record in records)
    found: dict[str, object] = {
        "requests": len(records),
        "answered": len(waits),
        "empty_answers": empty,
        "errors": dict(sorted(errors.items())),
        "duration_s": duration_s,
        "requests_per_s": len(waits) * rate,
        "prompt_tokens": sum(record.prompt_tokens for record in records),
        "output_tokens": sum(record.output_tokens for record in records),
        "output_tokens_per_s": sum(record.output_tokens for record in records) * rate,
        "latest_send_ms": max(((one.sent_s - one.due_s) * 1e3 for one in records), default=0.0),
    }
    if targets_ms:
        good = sum(_is_good(one, targets_ms) for one in waits)
        found |= {"targets_ms": dict(targets_ms), "good_requests_per_s": good * rate}
        found |= {"good_share": good / len(records) if records else 0.0}
    return found | {"waits_ms": _rows(waits)}


def _is_good(waits: Waits, targets_ms: Mapping[str, float]) -> bool:
    values = {
        "ttft": waits.first,
        "itl": float(np.percentile(waits.between, 99)) if waits.between else 0.0,
        "tpot": waits.each or 0.0,
        "e2e": waits.whole,
    }
    return all(values[name] <= limit for name, limit in targets_ms.items())


def _rows(waits: Sequence[Waits]) -> list[dict[str, object]]:
    columns = {
        "ttft": [one.first for one in waits],
        "itl": [gap for one in waits for gap in one.between],
        "tpot": [one.each for one in waits if one.each is not None],
        "e2e": [one.whole for one in waits],
    }
    return [
        {"of": TARGETS[name], "mean": statistics.fmean(values)}
        | {f"p{one}": float(np.percentile(values, one)) for one in PERCENTILES}
        for name, values in columns.items()
        if values
    ]
