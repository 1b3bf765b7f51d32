"""What runs in a child process: some cases in one mode, one line of JSON on standard output for each thing done."""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time
import traceback

import jax

from pallas_kernels import tuning
from tools import gpu_compile, ptx
from tools.gpu_check import cases as case_list
from tools.gpu_check import measure, rank, sweep
from tools.gpu_check.case import Case, Inputs, row_errors, same_bits

# Longest search for better blocks in one case.
SWEEP_SECONDS = 20.0
# Inputs of the two checks, and of the sets that are timed.
CHECK_SEEDS = (11, 12)
TIMED_SEED = 100


def main(argv: list[str]) -> None:
    """Runs the cases named in `argv`."""
    parser = argparse.ArgumentParser(prog="gpu_check child")
    parser.add_argument("--mode", choices=("gpu", "interpret", "compile"), required=True)
    parser.add_argument("--deadline", type=float, required=True, help="time.time() after which nothing new starts")
    parser.add_argument("--tuning", type=pathlib.Path, help="where to write better blocks")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("names", nargs="+")
    args = parser.parse_args(argv)
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


def tell(**message: object) -> None:
    """One line to the parent."""
    print(json.dumps(message), flush=True)


def run_one(name: str, args: argparse.Namespace) -> dict[str, object]:
    """Everything of one case."""
    special = {"ceilings": rank.ceilings, "rank_step": rank.rank_step}.get(name)
    if special is not None:
        return special(args.mode, is_quick=args.quick)
    case = case_list.by_name(name, args.mode, is_quick=args.quick)
    if args.mode == "compile":
        return compile_case(case)
    if args.mode == "interpret":
        return interpret_case(case)
    return gpu_case(case, args)


def gpu_case(case: Case, args: argparse.Namespace) -> dict[str, object]:
    """Correctness with fresh inputs and repeated, then times, peers and better blocks."""
    result: dict[str, object] = {"status": "PASS"}
    run = jax.jit(lambda *inputs: case.run(*inputs, implementation="mosaic"))
    for seed in CHECK_SEEDS if case.tolerance is not None else ():
        inputs = case.make(seed)
        first = case.view(jax.block_until_ready(run(*inputs)), inputs)
        if not same_bits(first, case.view(run(*inputs), inputs)):
            return {"status": "FAIL", "reason": "two runs on the same inputs differ"}
        worst = float(row_errors(first, reference_of(case, inputs)).max(initial=0.0))
        result["error"] = max(worst, float(result.get("error", 0.0)))
        if not worst <= case.tolerance:
            return {**result, "status": "FAIL", "reason": f"error {worst:.2e} above {case.tolerance:.0e}"}
        del inputs, first
    if not case.is_timed:
        return result
    sets = [case.make(TIMED_SEED + index) for index in range(case.num_sets)]
    if case.tolerance is None and not same_bits(*(case.view(run(*sets[0]), sets[0]) for _ in range(2))):
        return {"status": "FAIL", "reason": "two runs on the same inputs differ"}
    seconds = measure.seconds_per_call(run, sets, carry=case.carry)
    result |= {"us": seconds * 1e6, "sets": len(sets)}
    result["peers"] = {name: _peer_us(case, name, sets) for name in case.peers}
    if case.tuned and not args.quick and args.tuning is not None:
        # A trial may hang; what is known by now must not be lost with it.
        tell(event="partial", name=case.name, **result)
        left = min(SWEEP_SECONDS, args.deadline - time.time())
        entries = sweep.best_blocks(
            case, sets, seconds, seconds=left, report=lambda what: tell(event="trial", name=case.name, blocks=what)
        )
        if entries:
            add_to_tuning(args.tuning, entries)
            result["tuned_us"] = entries[0]["us"]
    return result


def reference_of(case: Case, inputs: Inputs) -> object:
    """What the case means; float32 products in float32, which is not what a GPU does unasked."""
    with jax.default_matmul_precision("highest"):
        return case.view(jax.jit(lambda *given: case.run(*given, implementation="reference"))(*inputs), inputs)


def _peer_us(case: Case, name: str, sets: list[Inputs]) -> float | str:
    """Microseconds of a peer, or why it does not run here."""
    peer = case.peers[name]
    try:
        prepared = [peer.prepare(*inputs) for inputs in sets]
        return measure.seconds_per_call(peer.run, prepared, carry=case.carry) * 1e6
    except Exception as error:  # a library that is missing or refuses: no fault of the kernel
        return f"{type(error).__name__}: {error}"[:160]


def add_to_tuning(path: pathlib.Path, entries: list[tuning.Entry]) -> None:
    """Adds entries to the file, which may be there already."""
    old = json.loads(path.read_text())["entries"] if path.exists() else []
    device = jax.devices()[0].device_kind
    tuning.write(path, [*old, *entries], device=device, jax_version=jax.__version__)


def interpret_case(case: Case) -> dict[str, object]:
    """The kernel in the interpreter against its reference."""
    inputs = case.make(CHECK_SEEDS[0])
    got = case.view(jax.jit(lambda *given: case.run(*given, implementation="interpret"))(*inputs), inputs)
    worst = float(row_errors(got, reference_of(case, inputs)).max(initial=0.0))
    assert case.tolerance is not None
    if not worst <= case.tolerance:
        return {"status": "FAIL", "error": worst, "reason": f"error {worst:.2e} above {case.tolerance:.0e}"}
    return {"status": "PASS", "error": worst}


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
