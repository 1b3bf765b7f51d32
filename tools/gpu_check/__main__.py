"""Command line: what runs in which order, and what becomes of the results."""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import math
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from pallas_kernels import common, tuning
from tools.gpu_check import cases as case_list
from tools.gpu_check import order, report, torch_peers
from tools.gpu_check.case import Case
from tools.gpu_check.parent import ROOT, Children, Settings

# Nothing new is started in the last tenth of a run.
USABLE_BUDGET = 0.9
# What the results are valid for, besides versions: these files.
SOURCES = ("pallas_kernels/**/*.py", "tools/**/*.py", "step3_jax/**/*.py", "models/step3-tiny/*")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the check; 0 if nothing failed."""
    start = time.time()
    parser = _parser()
    args = parser.parse_args(argv)
    mode = "compile" if args.compile_only else "interpret" if args.interpret else "gpu"
    if args.rehearse and mode != "interpret":
        parser.error("--rehearse goes with --interpret: its cases hang and die on purpose")
    cases = case_list.all_cases(mode, is_quick=args.quick, with_fakes=args.rehearse)
    known = {case.name: case for case in cases}
    stages = [(True, order.first(cases, mode))] if not args.rest else []
    stages += [(False, order.rest(cases, mode))] if not args.first else []
    names = {name for _, part in stages for stage in part for lane in stage.lanes for name in lane}
    wanted = _chosen(names, known, args.only)
    if not wanted:
        kernels = sorted({case.kernel for case in cases})
        parser.error(f"--only {args.only}: no case starts with that; the kernels are {', '.join(kernels)}")
    if mode == "gpu" and not shutil.which("nvidia-smi"):
        parser.error("no nvidia-smi here, so no NVIDIA GPU: --interpret and --compile-only run without one")
    conditions = _conditions(mode, is_quick=args.quick)
    if mode == "gpu" and not str(conditions["gpu"]).endswith(common.COMPUTE_CAPABILITY):
        parser.error(
            f"the GPU is {conditions['gpu']}; the kernels are for compute capability {common.COMPUTE_CAPABILITY}"
        )

    budget = args.budget or (order.FIRST_S if args.first else order.REST_S if args.rest else order.BUDGET_S)
    # Children run in the root of the tree.
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    tuning_file = (args.tuning or tuning.path()).resolve()
    record = report.read(out / "results.json", conditions)
    print(json.dumps(conditions), flush=True)
    if record.results:
        print(f"going on with {len(record.results)} cases of {out / 'results.json'}", flush=True)
    # Time is short on a GPU only; on a CPU whatever has started may finish.
    end = start + budget if mode == "gpu" else math.inf
    children = Children(Settings(mode, out, args.cache.resolve(), tuning_file, end, args.quick))
    try:
        for is_first, part in stages:
            seconds = min(budget, order.FIRST_S) if is_first and mode == "gpu" else budget * USABLE_BUDGET
            _run_part(children, part, record, known, wanted, start=start, seconds=seconds)
            print(report.table(record.results), flush=True)
            if not _is_sane(record):
                print("nothing passed, so the rest is left out", flush=True)
                break
    finally:
        children.end()
    if mode == "gpu" and not args.first and not args.only and time.time() - start < budget * USABLE_BUDGET:
        record.conditions["torch_us"] = torch_peers.measure(budget - (time.time() - start))
        _write(record, known, out)
    if tuning_file.exists() and tuning_file.parent != out:
        shutil.copy(tuning_file, out)
    print(f"{report.counts(record.results)}; {time.time() - start:.0f} s; {out / 'results.json'}")
    return 1 if any(result["status"] == "FAIL" for result in record.results.values()) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check", description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("gpu_check"), help="folder for results")
    parser.add_argument("--budget", type=float, help="seconds (default: 540; 240 with --first, 300 with --rest)")
    parser.add_argument("--only", help="kernels or starts of names, separated by commas: mfa_decode,fp8_matmul/64")
    parser.add_argument(
        "--tuning", type=pathlib.Path, help="where to write better blocks (default: where the kernels look)"
    )
    default = pathlib.Path(tempfile.gettempdir()) / "step3-gpu-check"
    parser.add_argument("--cache", type=pathlib.Path, default=default, help=f"compiled programs (default: {default})")
    parser.add_argument("--quick", action="store_true", help="the first case of each kernel, and one that is timed")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--first", action="store_true", help="the most useful part: rates, forms, times, the step")
    part.add_argument("--rest", action="store_true", help="everything else; what --first left in --out is kept")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--compile-only", action="store_true", help="lower and compile for an H100, on any machine")
    mode.add_argument("--interpret", action="store_true", help="small shapes in the interpreter, on any machine")
    parser.add_argument("--rehearse", action="store_true", help="add cases that are slow, silent, wrong and killed")
    return parser


def _run_part(
    children: Children,
    stages: Sequence[order.Stage],
    record: report.Record,
    known: dict[str, Case],
    wanted: set[str],
    *,
    start: float,
    seconds: float,
) -> None:
    """Runs what a part still has to do, within `seconds` of the run's start."""
    out, mode = children.settings.out, children.settings.mode
    for whole in stages:
        stage = whole.only(lambda phase, name: name in wanted and record.is_wanted(phase, name))
        if stage is None:
            continue
        until = start + seconds * (stage.until if mode == "gpu" else 1.0)
        copy_rate = record.ceilings.get("copy_bytes_per_s")
        for name, result, is_all in children.run(stage, deadline=until, copy_rate=copy_rate):
            elapsed = time.time() - start
            record.add(name, stage.phase, result, is_all=is_all, at=elapsed)
            found = result.get("ceilings")
            if isinstance(found, dict) and mode == "gpu":
                record.ceilings.update(found)
                _keep_target_config(out)
            _write(record, known, out)
            if is_all:
                reason = result.get("reason", "")
                print(f"{elapsed:6.1f} s  {stage.phase:<11} {result['status']:<8} {name}  {reason}", flush=True)


def _write(record: report.Record, known: dict[str, Case], out: pathlib.Path) -> None:
    """Judges again, since rates become known on the way, and writes."""
    for name, result in record.results.items():
        if name in known:
            record.results[name] = report.judge(known[name], result, record.ceilings)
    report.write(out / "results.json", record)


def _is_sane(record: report.Record) -> bool:
    return any(result["status"] != "FAIL" for name, result in record.results.items() if name != order.FIRST)


def _chosen(names: set[str], known: dict[str, Case], only: str | None) -> set[str]:
    if not only:
        return names
    parts = [part.strip() for part in only.split(",") if part.strip()]
    picked = {
        name
        for name in names
        if any(name.startswith(part) or (name in known and known[name].kernel == part) for part in parts)
    }
    # A time cannot be judged without the rates.
    return picked | {order.FIRST} if picked else picked


def _keep_target_config(out: pathlib.Path) -> None:
    """Moves XLA's description of the GPU out of its dump, and drops the rest."""
    found = sorted((out / "xla").glob("*gpu_target_config.pbtxt"))
    if found:
        found[0].replace(out / "gpu_target_config.pbtxt")
    shutil.rmtree(out / "xla", ignore_errors=True)


def _conditions(mode: str, *, is_quick: bool) -> dict[str, object]:
    """What the results are valid for."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in ROOT.glob(pattern) if path.is_file()):
        digest.update(path.read_bytes())
    conditions: dict[str, object] = {"mode": mode, "quick": is_quick, "sources": digest.hexdigest()[:16]}
    conditions["python"] = sys.version.split()[0]
    for package in ("jax", "jaxlib", "flax", "jax-cuda13-plugin", "numpy", "torch"):
        try:
            conditions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            conditions[package] = None
    if mode == "gpu":
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,compute_cap", "--format=csv,noheader"]
        conditions["gpu"] = subprocess.run(
            query, capture_output=True, text=True, check=False, timeout=30
        ).stdout.strip()
    return conditions


if __name__ == "__main__":
    # A run that is terminated also terminates its children.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
