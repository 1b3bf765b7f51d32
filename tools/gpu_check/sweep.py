"""A small search for better block sizes, one block at a time, for kernels that ask `pallas_kernels.tuning` for them."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax

from pallas_kernels import tuning
from pallas_kernels.common import Implementation
from tools.gpu_check.case import Case, Inputs, row_errors
from tools.gpu_check.measure import seconds_per_call

# A gain below this is noise.
MIN_GAIN = 0.02
RUNS = 7
# A different order of summation, or other splits, may change the last bits of a 16-bit result.
MAX_CHANGE = 1e-2


def best_blocks(
    case: Case,
    sets: Sequence[Inputs],
    before: float,
    *,
    implementation: Implementation = "mosaic",
    seconds: float,
    report: Callable[[str], None],
) -> list[tuning.Entry]:
    """Tries neighbours of each block of `case.tuned` and returns entries for `tuning.write` if any is faster.

    Args:
      case: The case to time.
      sets: Inputs to rotate among.
      before: Seconds per call with the current blocks.
      implementation: The implementation to try.
      seconds: When to stop.
      report: Called with each trial before it runs; it may hang, and the parent must know where.
    """
    run = functools.partial(case.run, implementation=implementation)
    expected = case.view(jax.jit(run)(*sets[0]), sets[0])
    deadline = time.perf_counter() + seconds
    best: dict[str, dict[str, int]] = {op: {} for op in case.tuned}
    fastest = before
    for op in case.tuned:
        for name, size in _blocks_of(op, run, sets[0]).items():
            for candidate in _neighbours(name, size):
                if time.perf_counter() > deadline:
                    break
                changed = {**best, op: {**best[op], name: candidate}}
                report(f"trying {op} {changed[op]}")
                with _trials(changed):
                    now = _try(case, run, sets, expected)
                if now is not None and now < fastest * (1 - MIN_GAIN):
                    best, fastest = changed, now
    if fastest == before:
        return []
    with _trials(best) as requests:
        jax.eval_shape(run, *sets[0])
    return [
        tuning.Entry(op=request.op, shape=request.shape, blocks=request.blocks, us=fastest * 1e6)
        for request in requests
        if best[request.op]
    ]


def _blocks_of(op: str, run: Callable[..., object], inputs: Inputs) -> dict[str, int]:
    """The blocks that `op` asks for here; the first shape's if there are several."""
    with _trials({op: {}}) as requests:
        jax.eval_shape(run, *inputs)
    return requests[0].blocks if requests else {}


def _neighbours(name: str, size: int) -> list[int]:
    """One step in either direction: by one for depths and splits, by a factor of two for sizes."""
    if "stage" in name or "slot" in name or "split" in name:
        return [value for value in (size + 1, size - 1) if value > 0]
    return [size * 2, *([size // 2] if size > 1 else [])]


@contextlib.contextmanager
def _trials(changes: Mapping[str, Mapping[str, int]]) -> Iterator[list[tuning.Request]]:
    """`tuning.trial` of several operations, with nothing left over from earlier traces."""
    jax.clear_caches()
    with tuning.trial(changes) as requests:
        yield requests


def _try(case: Case, run: Callable[..., object], sets: Sequence[Inputs], expected: object) -> float | None:
    """Seconds per call; None if the blocks do not fit or change the result."""
    try:
        if row_errors(case.view(jax.jit(run)(*sets[0]), sets[0]), expected).max(initial=0.0) > MAX_CHANGE:
            return None
        return seconds_per_call(run, sets, carry=case.carry, runs=RUNS)
    except (ValueError, NotImplementedError, RuntimeError):
        # Too much shared memory, sizes that do not divide, too many registers: not an option here.
        return None
