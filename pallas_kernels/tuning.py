"""Block sizes of the kernels: measured ones if there are any, else the kernel's own defaults.

`tools/gpu_check` measures them on a GPU and writes `tuning.json` next to this file, or the file that the environment
variable STEP3_KERNELS_TUNING names:

    {"device": "NVIDIA H100 80GB HBM3", "jax": "0.11.2",
     "entries": [{"op": "fp8_matmul", "shape": {"m": 64, "n": 7168}, "blocks": {"stages": 4}, "us": 43.1}]}
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, TypedDict

ENVIRONMENT_VARIABLE = "STEP3_KERNELS_TUNING"
SHIPPED = pathlib.Path(__file__).with_name("tuning.json")
# How far a measured shape may be from the requested one, as a factor, in each of its sizes.
MAX_FACTOR = 2.0


class Entry(TypedDict):
    """Best blocks of one operation at one shape, and the microseconds that they took."""

    op: str
    shape: dict[str, int | str]
    blocks: dict[str, int]
    us: float


class Request(NamedTuple):
    """A kernel's request during a `trial`, and its answer."""

    op: str
    shape: dict[str, int | str]
    blocks: dict[str, int]


class _Trial(NamedTuple):
    changes: Mapping[str, Mapping[str, int]]
    requests: list[Request]


_trial: contextvars.ContextVar[_Trial | None] = contextvars.ContextVar("trial", default=None)


def blocks(op: str, defaults: Mapping[str, int], **shape: int | str) -> dict[str, int]:
    """Block sizes for `op` at `shape`.

    Uses the measured entry with the same names in `shape`, equal strings, and the nearest sizes (by the sum of
    |log2| of their ratios), none of them more than twice as large or small. Blocks it does not name keep their defaults.

    Args:
      op: Name of the operation's folder.
      defaults: All block sizes of the kernel, with their values without a measurement.
      **shape: Sizes and dtypes that the choice depends on, such as m=64, storage="fp8".

    Raises:
      ValueError: If the file is not one that `write` makes, or names a block that `defaults` lacks.
    """
    chosen = _measured(op, defaults, shape)
    trial_now = _trial.get()
    if trial_now is not None and op in trial_now.changes:
        chosen.update((name, size) for name, size in trial_now.changes[op].items() if name in chosen)
        trial_now.requests.append(Request(op, dict(shape), dict(chosen)))
    return chosen


@contextlib.contextmanager
def trial(changes: Mapping[str, Mapping[str, int]]) -> Iterator[list[Request]]:
    """Inside, `changes` override the blocks of the named operations; returns the list of their requests.

    A compiled kernel makes no request: call `jax.clear_caches` first.
    """
    requests: list[Request] = []
    token = _trial.set(_Trial(changes, requests))
    try:
        yield requests
    finally:
        _trial.reset(token)


def path() -> pathlib.Path:
    """The file to read; it need not exist."""
    return pathlib.Path(os.environ.get(ENVIRONMENT_VARIABLE) or SHIPPED)


def write(target: pathlib.Path, entries: Sequence[Entry], *, device: str, jax_version: str) -> None:
    """Writes measured entries; of two with the same op and shape the later one wins."""
    unique = {(entry["op"], json.dumps(entry["shape"], sort_keys=True)): entry for entry in entries}
    content = {"device": device, "jax": jax_version, "entries": [unique[key] for key in sorted(unique)]}
    partial = target.with_name(target.name + ".tmp")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(target)
    _entries.cache_clear()


def _measured(op: str, defaults: Mapping[str, int], shape: Mapping[str, int | str]) -> dict[str, int]:
    best, best_distance = None, math.inf
    for entry in _entries(path()):
        distance = _distance(entry["shape"], shape) if entry["op"] == op else math.inf
        if distance < best_distance:
            best, best_distance = entry, distance
    if best is None:
        return dict(defaults)
    unknown = sorted(set(best["blocks"]) - set(defaults))
    if unknown:
        raise ValueError(
            f"{path()}: {op} has no block {', '.join(unknown)}; it has {', '.join(sorted(defaults))}. "
            "The file is from another version: measure again with python -m tools.gpu_check, or remove it"
        )
    return {**defaults, **best["blocks"]}


@functools.lru_cache
def _entries(source: pathlib.Path) -> tuple[Entry, ...]:
    if not source.exists():
        return ()
    try:
        entries = tuple(json.loads(source.read_text())["entries"])
        well_formed = all(_is_entry(entry) for entry in entries)
    except (KeyError, TypeError, ValueError):
        well_formed = False
    if not well_formed:
        raise ValueError(
            f"{source} is not a list of measured block sizes: write it with python -m tools.gpu_check, or remove it"
        )
    return entries


def _is_entry(entry: Entry) -> bool:
    return (
        isinstance(entry["op"], str)
        and all(isinstance(size, int | str) for size in entry["shape"].values())
        and all(isinstance(size, int) and size > 0 for size in entry["blocks"].values())
    )


def _distance(measured: Mapping[str, int | str], asked: Mapping[str, int | str]) -> float:
    """Sum of |log2| of the ratios; infinite if one cannot replace the other."""
    if measured.keys() != asked.keys():
        return math.inf
    total = 0.0
    for name, size in asked.items():
        other = measured[name]
        if size == other:
            continue
        if isinstance(size, str) or isinstance(other, str) or min(size, other) <= 0:
            return math.inf
        step = abs(math.log2(size / other))
        if step > math.log2(MAX_FACTOR):
            return math.inf
        total += step
    return total
