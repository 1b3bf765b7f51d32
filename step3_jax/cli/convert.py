"""`step3 convert`: from the released layout to Orbax and back, from BF16 to block-FP8 and back."""

from __future__ import annotations

import argparse
import json
import pathlib
import shutil
import sys

import jax

from step3_jax import resources
from step3_jax.checkpoint.convert import Report, convert, fit_workers
from step3_jax.checkpoint.memory import format_bytes
from step3_jax.checkpoint.plan import Plan, plan_conversion
from step3_jax.checkpoint.shards import write_text
from step3_jax.checkpoint.source import open_source
from step3_jax.checkpoint.transform import BandError
from step3_jax.checkpoint.verify import Comparison, verify
from step3_jax.cli.process import interrupt_note

MAX_SHOWN = 10
INTERRUPTED = "interrupted; what has been converted is kept: the same command with --resume continues from there"
FORM_TITLES = {"hf": "released layout", "orbax": "Orbax"}


def run(arguments: argparse.Namespace) -> int:
    """Converts, and verifies if asked to."""
    # Conversion does not use an accelerator; holding one would only keep it from others.
    jax.config.update("jax_platforms", "cpu")
    source = open_source(resources.find_folder(arguments.source), arguments.companions)
    plan = plan_conversion(source, form=arguments.to, dtype=arguments.dtype, shard_bytes=arguments.shard_size)
    _print_plan(plan, arguments.target)
    if arguments.dry_run:
        return 0
    is_there = arguments.target.is_dir() and any(arguments.target.iterdir())
    if is_there and arguments.verify and not arguments.resume:
        print("DST exists: only comparing")
    else:
        with interrupt_note(INTERRUPTED):
            report = convert(
                plan,
                arguments.target,
                resume=arguments.resume,
                num_workers=arguments.workers,
                max_memory=arguments.max_memory,
                progress=sys.stderr.isatty(),
            )
        _print_report(report)
        if not arguments.verify:
            _print_errors(report.errors)
        if arguments.report is not None and not arguments.verify:
            _write_lines(arguments.report, [_error_line(name, error) for name, error in report.errors.items()])
    if not arguments.verify:
        return 0
    result = open_source(arguments.target)
    num_workers = fit_workers(source, arguments.workers, arguments.max_memory)
    comparisons = verify(source, result, num_workers=num_workers, progress=sys.stderr.isatty())
    if arguments.report is not None:
        _write_lines(arguments.report, [_comparison_line(comparison) for comparison in comparisons])
    return _print_comparisons(comparisons)


def _print_plan(plan: Plan, target: pathlib.Path) -> None:
    source = plan.source
    num_bytes = sum(plan.output_bytes)
    files = f", {plan.num_shards} file{'s'[: plan.num_shards > 1]}" if plan.form == "hf" else ""
    print(f"from  {source.folder}: {source.describe()}, {format_bytes(source.num_bytes)}")
    print(f"to    {target}: {_describe_result(plan)}, {len(plan.outputs)} tensors, {format_bytes(num_bytes)}{files}")
    actions = {
        action: sum(task.action == action for task in plan.tasks) for action in ("cast", "quantise", "dequantise")
    }
    shown = [f"{action} {count}" for action, count in actions.items() if count]
    copied = len(plan.tasks) - sum(actions.values())
    print("tensors  " + ", ".join(shown + ([f"copy {copied}"] if copied else [])))
    names = [source.config_path.name, *source.companion_names]
    print(f"other files  {', '.join(names)}")
    if source.left_out:
        print(f"left out  {', '.join(source.left_out)}")
    free = _free_bytes(target)
    print(f"free  {format_bytes(free)}{', which is too little' if free < num_bytes else ''}", flush=True)


def _describe_result(plan: Plan) -> str:
    return f"{FORM_TITLES[plan.form]}{f', {plan.dtype}' if plan.dtype else ''}"


def _free_bytes(target: pathlib.Path) -> int:
    """Free bytes on the disk that the result goes to."""
    folder = target.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _print_report(report: Report) -> None:
    if report.bytes_read:
        rate = report.bytes_read / max(report.seconds, 1e-9)
        print(
            f"done  {report.num_tensors} tensors, {format_bytes(report.num_bytes)}, read "
            f"{format_bytes(report.bytes_read)} in {report.seconds:.1f} s ({rate / 1e9:.2f} GB/s)"
        )
    else:
        print("done  nothing was left to do")


def _print_errors(errors: dict[str, BandError]) -> None:
    if not errors:
        return
    total = sum(errors.values(), BandError())
    print(
        f"rounding  relative RMS {total.relative_rms:.2e}, largest {total.largest:.2e}; the {MAX_SHOWN} largest tensors:"
    )
    worst = sorted(errors, key=lambda name: errors[name].relative_rms, reverse=True)[:MAX_SHOWN]
    for name in worst:
        print(f"  {errors[name].relative_rms:.2e}  {errors[name].largest:.2e}  {name}")


def _print_comparisons(comparisons: list[Comparison]) -> int:
    """The verdict, and the exit code."""
    wrong = [comparison for comparison in comparisons if comparison.num_wrong_bytes]
    lossy = {comparison.task.name: comparison.error for comparison in comparisons if comparison.task.is_lossy}
    _print_errors(lossy)
    for comparison in wrong[:MAX_SHOWN]:
        print(f"  DIFFERS  {comparison.num_wrong_bytes} bytes  {comparison.task.name}")
    if wrong:
        print(f"verified  {len(wrong)} of {len(comparisons)} tensors are not what they should be")
        return 1
    print(f"verified  {len(comparisons) - len(lossy)} tensors exact, {len(lossy)} rounded as they should be")
    return 0


def _error_line(name: str, error: BandError) -> dict[str, object]:
    return {"tensor": name, "relative_rms_error": error.relative_rms, "largest_error": error.largest}


def _comparison_line(comparison: Comparison) -> dict[str, object]:
    task = comparison.task
    about = {
        "action": task.action,
        "from": task.source_dtype,
        "to": task.dtype,
        "wrong_bytes": comparison.num_wrong_bytes,
    }
    return _error_line(task.name, comparison.error) | about


def _write_lines(path: pathlib.Path, lines: list[dict[str, object]]) -> None:
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
