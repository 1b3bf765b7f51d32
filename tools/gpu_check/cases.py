"""All cases, and the order in which they run."""

from __future__ import annotations

from collections.abc import Iterable

from tools.gpu_check import attention, products, rows
from tools.gpu_check.case import Case

# Not kernels: the device's own rates, and a whole rank's step.
FIRST, STEP = "ceilings", "rank_step"


def all_cases(mode: str, *, is_quick: bool) -> list[Case]:
    """Cases of a mode ("gpu", "interpret", "compile"), smallest of each kernel first.

    The interpreter gets small shapes. `is_quick` keeps, of each kernel, the first case and on a GPU one timed case.
    """
    is_small = mode == "interpret"
    groups = [
        attention.decode_cases(is_small=is_small),
        products.matmul_cases(is_small=is_small),
        products.moe_cases(is_small=is_small),
        attention.prefill_cases(is_small=is_small),
        rows.row_cases(is_small=is_small),
    ]
    cases = [case for group in groups for case in group]
    return _quick(cases, mode) if is_quick else cases


def in_order(cases: Iterable[Case]) -> list[str]:
    """Names, most worth knowing first, since the time may end: is it right, are the goals reached, how fast is a step."""
    cases = list(cases)
    checks = [case.name for case in cases if not case.is_timed]
    goals = [case.name for case in cases if case.is_timed and case.goal is not None]
    rest = [case.name for case in cases if case.is_timed and case.goal is None]
    return [FIRST, *checks, *goals, STEP, *rest]


def by_name(name: str, mode: str, *, is_quick: bool) -> Case:
    """The case of that name."""
    return next(case for case in all_cases(mode, is_quick=is_quick) if case.name == name)


def _quick(cases: list[Case], mode: str) -> list[Case]:
    kept: list[Case] = []
    for case in cases:
        same = [other for other in kept if other.kernel == case.kernel and other.is_timed == case.is_timed]
        if not same and (mode == "gpu" or not case.is_timed):
            kept.append(case)
    return kept
