"""What runs in a child process: one phase of some cases, with a line of JSON on standard output for each thing done."""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import get_args

import jax

from pallas_kernels import tuning
from tools import gpu_compile, ptx
from tools.gpu_check import answers, measure, rank, sweep
from tools.gpu_check import cases as case_list
from tools.gpu_check.case import Case, Inputs, row_errors, same_bits
from tools.gpu_check.order import ANSWERS, FIRST, STEP, Phase

# Longest search for better blocks in one case.
SWEEP_SECONDS = 20.0
# Inputs of the checks, and of the sets that are timed.
CHECK_SEEDS = {"check": 11, "check_again": 12}
TIMED_SEED = 100
# Which implementation is checked in which mode, and which is timed: the interpreter's time would mean nothing, so on a CPU
# the references stand in for it.
CHECKED = {"gpu": "mosaic", "interpret": "interpret"}
TIMED = {"gpu": "mosaic", "interpret": "reference"}
RUNS = {"gpu": 7, "interpret": 2}

# Called with what happens next and, if that may take longer than usual, for how many seconds it may be silent.
Say = Callable[..., None]


def main(argv: list[str]) -> None:
    """Runs the cases named in `argv`."""
    parser = argparse.ArgumentParser(prog="gpu_check child")
    parser.add_argument("--mode", choices=("gpu", "interpret", "compile"), required=True)
    parser.add_argument("--phase", choices=get_args(Phase), required=True)
    parser.add_argument("--deadline", type=float, required=True, help="time.time() after which nothing new starts")
    parser.add_argument("--tuning", type=pathlib.Path, required=True, help="where to write better blocks")
    parser.add_argument("--copy-rate", type=float, help="bytes a second of a copy, as measured")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("names", nargs="+")
    args = parser.parse_args(argv)
    threading.Thread(target=_leave_with_parent, args=(os.getppid(),), daemon=True).start()
    for name in args.names:
        tell(event="start", name=name)
        if time.time() > args.deadline:
            tell(event="result", name=name, status="SKIPPED", reason="the time is up")
            continue
        try:
            result = run_one(name, args)
        except Exception as error:  # whatever it is, it is this case's result, and the next one runs
            traceback.print_exc()
            result = {"status": "FAIL", "reason": f"{type(error).__name__}: {error}"[:400]}
        tell(event="result", name=name, **result)


def _leave_with_parent(parent: int) -> None:
    """Ends the process when its parent is gone: a kernel that hangs on a GPU would stay there for ever."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def tell(**message: object) -> None:
    """One line to the parent."""
    print(json.dumps(message), flush=True)


def run_one(name: str, args: argparse.Namespace) -> dict[str, object]:
    """One phase of one case."""

    def say(doing: str, allowed_s: float | None = None) -> None:
        tell(event="doing", name=name, doing=doing, allowed_s=allowed_s)

    if name == FIRST:
        return rank.ceilings(args.mode, say, are_more=args.phase == "more_rates")
    report = functools.partial(tell, event="partial", name=name)
    if name == ANSWERS:
        return answers.answer_questions(args.mode, say, report, is_quick=args.quick, deadline=args.deadline)
    if name == STEP:
        return rank.rank_step(
            args.mode, say, report, is_quick=args.quick, copy_rate=args.copy_rate, deadline=args.deadline
        )
    case = case_list.by_name(name, args.mode)

    def say_of_case(doing: str, allowed_s: float | None = None) -> None:
        # On a CPU the mode's own silence is longer than what a GPU's cases ask for.
        say(doing, case.allowed_s or (allowed_s if args.mode == "gpu" else None))

    if args.mode == "compile":
        return compile_case(case)
    if args.phase in CHECK_SEEDS:
        return check_case(case, args.mode, CHECK_SEEDS[args.phase], say_of_case)
    sets = _make_sets(case, say_of_case)
    if args.phase == "time":
        return time_case(case, args.mode, sets, say_of_case)
    if args.phase == "peers":
        return {
            "status": "PASS",
            "peers": {name: _peer_us(case, name, args.mode, sets, say_of_case) for name in case.peers},
        }
    return sweep_case(case, args, sets, say_of_case)


def check_case(case: Case, mode: str, seed: int, say: Say) -> dict[str, object]:
    """The kernel on fresh inputs against its reference, and on a GPU run twice."""
    assert case.tolerance is not None
    say("making inputs")
    inputs = jax.block_until_ready(case.make(seed))
    say("compiling the kernel", measure.COMPILING_S)
    run = measure.compiled(functools.partial(case.run, implementation=CHECKED[mode]), *inputs)
    say("running the kernel")
    first = jax.block_until_ready(case.view(run(*inputs), inputs))
    if mode == "gpu":
        say("running the kernel again")
        if not same_bits(first, case.view(run(*inputs), inputs)):
            return {"status": "FAIL", "reason": "two runs on the same inputs differ"}
    say("compiling and running the reference", measure.COMPILING_S)
    worst = float(row_errors(first, reference_of(case, inputs)).max(initial=0.0))
    if not worst <= case.tolerance:
        return {"status": "FAIL", "error": worst, "reason": f"error {worst:.2e} above {case.tolerance:.0e}"}
    return {"status": "PASS", "error": worst}


def time_case(case: Case, mode: str, sets: list[Inputs], say: Say) -> dict[str, object]:
    """Microseconds per call; where there is no reference, also whether two runs give the same bits."""
    run = functools.partial(case.run, implementation=TIMED[mode])
    if case.tolerance is None:
        say("compiling the kernel", measure.COMPILING_S)
        compiled = measure.compiled(run, *sets[0])
        say("running the kernel twice")
        if not same_bits(*(case.view(compiled(*sets[0]), sets[0]) for _ in range(2))):
            return {"status": "FAIL", "reason": "two runs on the same inputs differ"}
    seconds = measure.seconds_per_call(run, sets, carry=case.carry, runs=RUNS[mode], say=say)
    return {"status": "PASS", "us": seconds * 1e6, "sets": len(sets)}


def sweep_case(case: Case, args: argparse.Namespace, sets: list[Inputs], say: Say) -> dict[str, object]:
    """A search for better blocks, which go to the tuning file."""
    implementation = TIMED[args.mode]
    run = functools.partial(case.run, implementation=implementation)
    before = measure.seconds_per_call(run, sets, carry=case.carry, runs=RUNS[args.mode], say=say)
    # On a CPU there is nothing to gain: the steps are rehearsed without trying a block.
    left = min(SWEEP_SECONDS, args.deadline - time.time()) if args.mode == "gpu" else 0.0
    entries = sweep.best_blocks(case, sets, before, implementation=implementation, seconds=left, report=say)
    if not entries:
        return {"status": "PASS"}
    add_to_tuning(args.tuning, entries)
    return {"status": "PASS", "tuned_us": entries[0]["us"]}


def reference_of(case: Case, inputs: Inputs) -> object:
    """What the case should give; float32 products in float32, which a GPU does not do by default."""
    with jax.default_matmul_precision("highest"):
        return case.view(jax.jit(functools.partial(case.run, implementation="reference"))(*inputs), inputs)


def _make_sets(case: Case, say: Say) -> list[Inputs]:
    sets = []
    for index in range(case.num_sets):
        say(f"making inputs {index + 1} of {case.num_sets}")
        sets.append(jax.block_until_ready(case.make(TIMED_SEED + index)))
    return sets


def _peer_us(case: Case, name: str, mode: str, sets: list[Inputs], say: Say) -> float | str:
    """Microseconds of a peer, or why it does not run here."""
    peer = case.peers[name]
    try:
        say(f"making inputs of {name}")
        prepared = [peer.prepare(*inputs) for inputs in sets]
        return measure.seconds_per_call(peer.run, prepared, carry=case.carry, runs=RUNS[mode], say=say) * 1e6
    except Exception as error:  # a library that is missing or refuses: no fault of the kernel
        return f"{type(error).__name__}: {error}"[:160]


def add_to_tuning(path: pathlib.Path, entries: list[tuning.Entry]) -> None:
    """Adds entries to the file, which may exist already."""
    old = json.loads(path.read_text())["entries"] if path.exists() else []
    device = jax.devices()[0].device_kind
    tuning.write(path, [*old, *entries], device=device, jax_version=jax.__version__)


def compile_case(case: Case) -> dict[str, object]:
    """Lowers for CUDA, and compiles for an H100 where the compiler is installed."""
    shapes = jax.eval_shape(lambda: case.make(0))

    def run(*inputs: object) -> object:
        return case.run(*inputs, implementation="mosaic")

    lowered = jax.jit(run).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    if "mosaic_gpu" not in lowered:
        return {"status": "FAIL", "reason": "the program for CUDA has no kernel in it"}
    if gpu_compile.missing():
        return {"status": "PASS", "reason": f"lowered only: {gpu_compile.missing()}"}
    _, reports = gpu_compile.compile_and_read(gpu_compile.h100_mesh(), run, *shapes)
    spills = sum(report.spill_bytes for report in reports)
    result: dict[str, object] = {
        "status": "PASS",
        "registers": max((report.registers for report in reports), default=0),
        "spill_bytes": spills,
        "smem_bytes": max((report.smem_bytes for report in reports), default=0),
        "wgmma": sorted({kind for report in reports for kind in report.wgmma}),
    }
    if any(report.num_mma_sync for report in reports):
        return {**result, "status": "FAIL", "reason": "an mma.sync is in the kernel: not Hopper's own product"}
    faults = [fault for report in reports if (fault := ptx.store_fault(case.name, report.num_plain_stores))]
    if faults:
        return {**result, "status": "FAIL", "reason": faults[0]}
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
