"""What runs when: the first four minutes give what is most worth knowing, since the time on a GPU may end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

from tools.gpu_check.case import Case

# Not kernels: the device's own rates, a whole rank's step, and the answers of the shipped model.
FIRST, STEP, ANSWERS = "ceilings", "rank_step", "tiny_model"

# What is done with a case. "rates": a copy and a large product; "more_rates": the others. "check": against the reference,
# with one seed, and the same bits twice; "check_again": with another seed. "time", "peers", "sweep": alone on the GPU.
Phase = Literal["rates", "check", "time", "more_rates", "check_again", "peers", "sweep"]
# That may fail without the kernel being wrong: it lost a comparison, or better blocks.
EXTRAS: tuple[Phase, ...] = ("more_rates", "peers", "sweep")

# Of a run in all, and of its first part.
BUDGET_S, FIRST_S, REST_S = 540.0, 240.0, 300.0
# Processes at once where only correctness is asked for: most of that is compilation, on the host.
LANES = 5

# One small case of each form that a kernel has, by what names are; where the mode has no such case, its smallest ones serve.
FORMS = (
    "mfa_decode/bfloat16/edges",
    "mfa_decode/fp8/edges",
    "mfa_decode/int4/edges",
    "mfa_decode/fp8/edges-4x16",
    "mfa_decode/fp8/edges/float16",
    "mfa_decode_quantised/fp8/edges/float16",
    "fp8_matmul/1x2048x7168",
    "fp8_matmul/128x2048x7168",
    "fp8_matmul/300x5120x1424",
    "moe_ffn/bfloat16/200x6of48/skewed",
    "moe_ffn/fp8/200x6of48/skewed",
    "moe_ffn/fp8/700x6of48/skewed",
    "mfa_prefill/bfloat16/edges",
    "mfa_prefill/fp8/edges",
    "dense_attention/edges",
    "norm_quantise/77x7168",
    "norm_quantise/77x2048/joined",
    "swiglu_quantise/64x5120",
    "swiglu_quantise/77x5120",
    "swiglu_quantise/77x5120/joined",
    "permute_rows/77x7168",
    "rope_cache_write/bfloat16/77",
    "rope_cache_write/fp8/77",
    "rope_cache_write/fp8/77/joined",
)
FIRST_TIMES = (
    "mfa_decode/bfloat16/64x8192/planned",
    "mfa_decode/fp8/64x8192/planned",
    "mfa_decode/int4/64x8192/planned",
    "mfa_decode_quantised/fp8/128x4096/float16/planned",
    "fp8_matmul/64x7168x16384",
    "fp8_matmul/64x18432x7168",
    "fp8_matmul/4096x7168x16384",
    "moe_ffn/fp8/1024x6of48/uniform",
    "moe_ffn/fp8/2731x48of48/uniform",
    "mfa_prefill/bfloat16/8k",
    "norm_quantise/64x7168",
    "rope_cache_write/fp8/128/joined",
)
FIRST_SWEEPS = ("mfa_decode/fp8/64x8192", "fp8_matmul/64x7168x16384", "moe_ffn/fp8/1024x6of48/uniform")


@dataclasses.dataclass(frozen=True)
class Stage:
    """Work of one phase.

    Attributes:
      phase: What is done.
      lanes: Names, for each of the processes that run at once.
      until: Share of the part's time after which nothing of it is begun any more.
    """

    phase: Phase
    lanes: tuple[tuple[str, ...], ...]
    until: float = 1.0

    def only(self, is_wanted: Callable[[Phase, str], bool]) -> Stage | None:
        """What is wanted of it; None if nothing is."""
        lanes = tuple(tuple(name for name in lane if is_wanted(self.phase, name)) for lane in self.lanes)
        lanes = tuple(lane for lane in lanes if lane)
        return dataclasses.replace(self, lanes=lanes) if lanes else None


def first(cases: Iterable[Case], mode: str) -> list[Stage]:
    """Rates, one small case of each form, times of the kernels that a step consists of, and the step."""
    known = {case.name: case for case in cases}
    forms = [name for name in FORMS if name in known] if mode == "gpu" else _checked(known.values(), mode)
    times = [name for name in FIRST_TIMES if name in known and mode == "gpu"] or _timed(known.values(), mode)
    return [
        Stage("rates", ((FIRST,),)),
        Stage("check", _spread(forms, known), until=0.4),
        Stage("time", (tuple(times),), until=0.65),
        Stage("time", ((STEP,),), until=0.9),
    ]


def rest(cases: Iterable[Case], mode: str) -> list[Stage]:
    """All else, what has a goal first. What the first part left undone is among it."""
    known = {case.name: case for case in cases}
    checked = _checked(known.values(), mode)
    timed = _timed(known.values(), mode)
    goals = [name for name in timed if known[name].goal is not None]
    forms = [name for name in FORMS if name in known]
    # On a CPU one kernel, which the interpreter is quick with, is enough to rehearse it.
    quickest = [name for name in checked if known[name].kernel == "norm_quantise"]
    again = {"gpu": forms, "interpret": quickest, "compile": []}[mode]
    swept = [name for name in FIRST_SWEEPS if name in timed]

    def alone(phase: Phase, names: Iterable[str]) -> Stage:
        return Stage(phase, (tuple(names),))

    return [
        Stage("rates", ((FIRST,),)),
        alone("more_rates", [FIRST]),
        Stage("check", _spread(forms, known)),
        alone("time", [name for name in FIRST_TIMES if name in timed]),
        alone("time", [STEP]),
        alone("check", [ANSWERS] if mode != "compile" else []),
        Stage("check_again", _spread(again, known)),
        alone("time", goals),
        alone("peers", [name for name in goals if known[name].peers]),
        alone("sweep", swept),
        Stage("check", _spread(checked, known)),
        alone("time", timed),
        alone("peers", [name for name in timed if known[name].peers]),
        alone("sweep", [name for name in timed if known[name].tuned]),
    ]


def _checked(cases: Iterable[Case], mode: str) -> list[str]:
    """What has a reference to be compared with, or, compiling, all."""
    return [case.name for case in cases if mode == "compile" or case.tolerance is not None]


def _timed(cases: Iterable[Case], mode: str) -> list[str]:
    return [case.name for case in cases if case.is_timed and mode != "compile"]


def _spread(names: Sequence[str], known: Mapping[str, Case]) -> tuple[tuple[str, ...], ...]:
    """Names on lanes, those of one kernel on one lane, which is then the only one that a hang of it holds up."""
    by_kernel: dict[str, list[str]] = {}
    for name in names:
        by_kernel.setdefault(known[name].kernel, []).append(name)
    lanes: list[list[str]] = [[] for _ in range(min(LANES, len(by_kernel)))]
    for group in sorted(by_kernel.values(), key=len, reverse=True):
        min(lanes, key=len).extend(group)
    return tuple(map(tuple, lanes))
