"""results.json and the table that ends the run."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence

from tools.gpu_check.case import Case

Result = Mapping[str, object]


def judge(case: Case, result: Result, ceilings: Mapping[str, float]) -> dict[str, object]:
    """Adds rates, the roofline's share and the goal's verdict to a timed result.

    The floor is the larger of bytes over the measured copy rate and FLOPs over the measured rate of large products; a
    goal counts the share of whichever binds. A goal that is missed is shown, and is no failure: the kernel is right.
    """
    judged = dict(result)
    us = judged.get("tuned_us", judged.get("us"))
    if not isinstance(us, float) or not ceilings:
        return judged
    by_bytes = case.num_bytes / ceilings["copy_bytes_per_s"] * 1e6
    by_flops = case.flops / ceilings[f"{case.rate}_flops"] * 1e6
    judged["floor_us"] = max(by_bytes, by_flops)
    judged["bound"] = "bytes" if by_bytes >= by_flops else "flops"
    judged["share"] = max(by_bytes, by_flops) / us
    judged["gb_per_s"] = case.num_bytes / us / 1e3
    judged["tflops"] = case.flops / us / 1e6
    peers = judged.get("peers")
    if isinstance(peers, dict):
        judged["times_faster"] = {name: other / us for name, other in peers.items() if isinstance(other, float)}
    if case.goal is not None:
        judged["goal"] = case.goal
        judged["goal_reached"] = judged["share"] >= case.goal
    return judged


def table(results: Mapping[str, Result]) -> str:
    """One line a case."""
    lines = [f"{'case':<48} {'status':<8} {'error':>8} {'us':>9} {'GB/s':>6} {'TF/s':>6} {'of roof':>8}  goal, peers"]
    for name, result in results.items():
        us = result.get("tuned_us", result.get("us"))
        notes = []
        if "goal" in result:
            notes.append(f"{'reached' if result['goal_reached'] else 'missed'} {result['goal']:.0%}")
        faster = result.get("times_faster")
        if isinstance(faster, dict):
            notes += [f"{times:.2f}x {peer}" for peer, times in faster.items()]
        if result.get("reason"):
            notes.append(str(result["reason"])[:60])
        lines.append(
            f"{name:<48} {result['status']:<8} {_number(result.get('error'), '8.1e')} {_number(us, '9.1f')} "
            f"{_number(result.get('gb_per_s'), '6.0f')} {_number(result.get('tflops'), '6.0f')} "
            f"{_number(result.get('share'), '8.1%')}  {', '.join(notes)}"
        )
    return "\n".join(lines)


def _number(value: object, form: str) -> str:
    width = int(form.partition(".")[0])
    return format(value, form) if isinstance(value, float) else " " * (width - 1) + "-"


def counts(results: Mapping[str, Result]) -> str:
    """How many passed, failed and were left out."""
    names: Sequence[object] = [result["status"] for result in results.values()]
    return ", ".join(f"{names.count(status)} {status}" for status in ("PASS", "FAIL", "SKIPPED"))


def write(path: pathlib.Path, conditions: Mapping[str, object], results: Mapping[str, Result]) -> None:
    """Writes the whole, under a temporary name first."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(json.dumps({"conditions": conditions, "results": results}, indent=1) + "\n")
    partial.replace(path)
