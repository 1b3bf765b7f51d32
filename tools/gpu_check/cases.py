"""All cases of a mode."""

from __future__ import annotations

from tools.gpu_check import attention, fakes, products, rows
from tools.gpu_check.case import Case


def all_cases(mode: str, *, is_quick: bool, with_fakes: bool = False) -> list[Case]:
    """Cases of a mode ("gpu", "interpret", "compile"), smallest of each kernel first.

    The interpreter gets small shapes. `is_quick` keeps each kernel's first case and its first timed one.
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
    return [*(_quick(cases, mode) if is_quick else cases), *(fakes.fake_cases() if with_fakes else [])]


def by_name(name: str, mode: str) -> Case:
    """The case of that name."""
    return next(case for case in all_cases(mode, is_quick=False, with_fakes=True) if case.name == name)


def _quick(cases: list[Case], mode: str) -> list[Case]:
    kept: list[Case] = []
    for case in cases:
        same = [other for other in kept if other.kernel == case.kernel and other.is_timed == case.is_timed]
        if not same and (mode != "compile" or not case.is_timed):
            kept.append(case)
    return kept
