"""Command line and parent process: starts children, gives each case its time, collects, judges."""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import pathlib
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

from pallas_kernels import common, tuning
from step3_jax.gpu import claim_memory
from tools.gpu_check import cases as case_list
from tools.gpu_check import report, torch_peers

ROOT = pathlib.Path(__file__).resolve().parents[2]
# A child that says nothing for so long hangs: a barrier that never completes, on a GPU, looks like this.
SILENCE_SECONDS = {"gpu": 60.0, "interpret": 300.0, "compile": 300.0}
# Nothing new is begun in the last tenth of the budget.
USABLE_BUDGET = 0.9


def main(argv: list[str] | None = None) -> int:
    """Runs the check; 0 if nothing failed."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check", description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("gpu_check"), help="folder for results")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds in all (default: 540)")
    parser.add_argument("--only", help="kernels or names that start so, with commas: mfa_decode,fp8_matmul/64")
    parser.add_argument("--tuning", type=pathlib.Path, help="where better blocks go (default: where the kernels look)")
    parser.add_argument("--quick", action="store_true", help="the first case of each kernel, and one time")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--compile-only", action="store_true", help="lower and compile for an H100, on any machine")
    mode.add_argument("--interpret", action="store_true", help="small shapes in the interpreter, on any machine")
    args = parser.parse_args(argv)
    mode_name = "compile" if args.compile_only else "interpret" if args.interpret else "gpu"

    start = time.time()
    # Children run in the root of the tree.
    args.out = args.out.resolve()
    args.tuning = (args.tuning or tuning.path()).resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    known = {case.name: case for case in case_list.all_cases(mode_name, is_quick=args.quick)}
    names = _chosen(case_list.in_order(known.values()), known, args.only)
    if not names:
        parser.error(f"--only {args.only}: no case begins so; the kernels are {', '.join(_kernels(known))}")
    if mode_name == "gpu" and not shutil.which("nvidia-smi"):
        parser.error("no nvidia-smi here, so no NVIDIA GPU: --interpret and --compile-only run without one")

    conditions = _conditions(mode_name, args)
    if mode_name == "gpu" and not str(conditions["gpu"]).endswith(common.COMPUTE_CAPABILITY):
        parser.error(
            f"the GPU is {conditions['gpu']}; the kernels are for compute capability {common.COMPUTE_CAPABILITY}"
        )
    print(json.dumps(conditions), flush=True)
    results: dict[str, dict[str, object]] = {}
    ceilings: dict[str, float] = {}
    for name, result in run_children(names, mode_name, args, deadline=start + args.budget * USABLE_BUDGET):
        if name == case_list.FIRST and isinstance(result.get("ceilings"), dict):
            ceilings = result["ceilings"] if mode_name == "gpu" else {}
            _keep_target_config(args.out)
        results[name] = report.judge(known[name], result, ceilings) if name in known else dict(result)
        print(f"{time.time() - start:6.1f} s  {result['status']:<8} {name}  {result.get('reason', '')}", flush=True)
        report.write(args.out / "results.json", conditions, results)
    if mode_name == "gpu" and not args.only and time.time() - start < args.budget * USABLE_BUDGET:
        conditions["torch"] = torch_peers.measure(args.budget - (time.time() - start))
        report.write(args.out / "results.json", conditions, results)
    if args.tuning.exists() and args.tuning.parent != args.out:
        shutil.copy(args.tuning, args.out)

    print(report.table(results))
    print(f"{report.counts(results)}; {time.time() - start:.0f} s; {args.out / 'results.json'}")
    return 1 if any(result["status"] == "FAIL" for result in results.values()) else 0


def _kernels(known: dict[str, case_list.Case]) -> list[str]:
    return sorted({case.kernel for case in known.values()})


def _chosen(names: list[str], known: dict[str, case_list.Case], only: str | None) -> list[str]:
    if not only:
        return names
    wanted = [part.strip() for part in only.split(",") if part.strip()]
    picked = []
    for name in names:
        kernel = known[name].kernel if name in known else name
        if any(name.startswith(part) or kernel == part for part in wanted):
            picked.append(name)
    # Without the ceilings a time cannot be judged.
    return [case_list.FIRST, *picked] if picked and case_list.FIRST not in picked else picked


def run_children(
    names: list[str], mode: str, args: argparse.Namespace, *, deadline: float
) -> Iterator[tuple[str, dict[str, object]]]:
    """Results in order. A child does as many cases as it can; after a crash or a hang a new one goes on with the rest."""
    left = list(names)
    # A process each: what is big must not meet what another case has left in the memory.
    alone = {case_list.FIRST, case_list.STEP}
    while left:
        batch = left[:1] if left[0] in alone else list(itertools.takewhile(lambda name: name not in alone, left))
        finished = 0
        for name, result in _run_child(batch, mode, args, deadline):
            finished += 1
            yield name, result
        left = left[finished:]


def _run_child(
    names: list[str], mode: str, args: argparse.Namespace, deadline: float
) -> Iterator[tuple[str, dict[str, object]]]:
    """Results of one child. If it ends before its time, the case it was at fails, and the rest is left to another."""
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    environment["JAX_PLATFORMS"] = "cuda" if mode == "gpu" else "cpu"
    environment[tuning.ENVIRONMENT_VARIABLE] = str(args.tuning)
    environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if mode == "gpu":
        environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(args.out / "cache"))
    if names == [case_list.STEP]:
        # Weights and cache nearly fill the GPU: one block of memory, so that nothing is lost between pieces.
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "true"
        claim_memory(environment)
    if mode == "gpu" and names == [case_list.FIRST]:
        # XLA's description of this GPU, for compiling where there is none, is among what it dumps.
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} --xla_dump_to={args.out / 'xla'}"
    with (args.out / "child.log").open("a") as log:
        child = subprocess.Popen(
            _command(names, mode, args, deadline),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )
        messages: queue.Queue[str | None] = queue.Queue()
        reader = threading.Thread(target=_read, args=(child, messages), daemon=True)
        reader.start()
        current, doing, partial = names[0], "starting", {}
        try:
            while True:
                try:
                    line = messages.get(timeout=SILENCE_SECONDS[mode])
                except queue.Empty:
                    yield current, _broken(partial, f"hangs ({doing}); killed")
                    return
                if line is None:
                    if current:
                        code = child.wait()
                        yield current, _broken(partial, f"the process ended with {code} ({doing}); child.log")
                    return
                message = json.loads(line)
                current, event = message.pop("name"), message.pop("event")
                doing = message.get("blocks", event)
                if event == "partial":
                    partial = message
                if event == "result":
                    yield current, message
                    current, partial = "", {}
        finally:
            child.kill()
            child.wait()
            reader.join(timeout=5)
            if child.stdout is not None and not reader.is_alive():
                child.stdout.close()


def _broken(partial: dict[str, object], reason: str) -> dict[str, object]:
    """The result of a case whose process is gone. Right and timed already, it lost only the search for better blocks."""
    return {**partial, "reason": reason} if partial else {"status": "FAIL", "reason": reason}


def _command(names: list[str], mode: str, args: argparse.Namespace, deadline: float) -> list[str]:
    command = [sys.executable, "-m", "tools.gpu_check.child", "--mode", mode, "--deadline", str(deadline)]
    return [*command, "--tuning", str(args.tuning), *(["--quick"] if args.quick else []), *names]


def _read(child: subprocess.Popen[str], messages: queue.Queue[str | None]) -> None:
    """Moves JSON lines to the queue; None at the end. Other lines are somebody's print."""
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("{"):
            messages.put(line)
    messages.put(None)


def _keep_target_config(out: pathlib.Path) -> None:
    """Moves XLA's description of the GPU out of what it dumped, and drops the rest."""
    found = sorted((out / "xla").glob("*gpu_target_config.pbtxt"))
    if found:
        found[0].replace(out / "gpu_target_config.pbtxt")
    shutil.rmtree(out / "xla", ignore_errors=True)


def _conditions(mode: str, args: argparse.Namespace) -> dict[str, object]:
    """What the results hold for."""
    conditions: dict[str, object] = {"mode": mode, "quick": args.quick, "python": sys.version.split()[0]}
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
    sys.exit(main())
