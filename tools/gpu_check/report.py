"""results.json, which is written after each case and read back, and the table that ends a part."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tools.gpu_check.case import Case
from tools.gpu_check.order import EXTRAS, Phase

Result = Mapping[str, object]

# The version of results.json. A file of another version is not read back.
SCHEMA = 2
# Part of a case was reported, and then the run ended.
CUT = "CUT"


class Record(NamedTuple):
    """What a run has found so far.

    Attributes:
      conditions: What it is valid for.
      ceilings: Measured rates by name; empty where times mean nothing.
      results: The result of each case; "phases" are those that are done.
      log: What ended when, in order.
    """

    conditions: dict[str, object]
    ceilings: dict[str, float]
    results: dict[str, dict[str, object]]
    log: list[dict[str, object]]

    def add(self, name: str, phase: Phase, result: Result, *, is_all: bool, at: float) -> None:
        """Merges what a phase of a case gave, or a part of it, with what is known of the case."""
        known = self.results.get(name, {})
        if phase in EXTRAS and result["status"] == "FAIL":
            result = {**result, "status": "PASS"}
        if is_all:
            self.log.append({"at": round(at, 1), "phase": phase, "name": name, "status": result["status"]})
        if result["status"] == "SKIPPED" and known:
            return
        merged = {**{key: value for key, value in known.items() if key != "reason"}, **result}
        # The worst of several phases counts.
        if not is_all:
            merged["status"] = CUT
        elif known.get("status") == "FAIL":
            merged["status"] = "FAIL"
        if "error" in known and "error" in result:
            merged["error"] = max(known["error"], result["error"])  # type: ignore[call-overload]
        if is_all and result["status"] != "SKIPPED":
            merged["phases"] = [*known.get("phases", []), phase]  # type: ignore[misc]
        self.results[name] = merged

    def is_wanted(self, phase: Phase, name: str) -> bool:
        """Whether a phase of a case is still to be done: neither one that is done, nor any of a kernel that is wrong."""
        result = self.results.get(name, {})
        return result.get("status") != "FAIL" and phase not in result.get("phases", ())  # type: ignore[operator]


def judge(case: Case, result: Result, ceilings: Mapping[str, float]) -> dict[str, object]:
    """Adds rates, the roofline's share and the goal's verdict to a timed result.

    The floor is the larger of bytes over the measured copy rate and FLOPs over the measured rate of large products; a
    goal counts the share of whichever binds. A missed goal is shown but is not a failure: the kernel is right. Nothing
    is judged by a rate that has not been measured on the GPU at hand.
    """
    judged = dict(result)
    us = judged.get("tuned_us", judged.get("us"))
    rate = f"{case.rate}_flops"
    if not isinstance(us, float) or "copy_bytes_per_s" not in ceilings:
        return judged
    judged["gb_per_s"] = case.num_bytes / us / 1e3
    judged["tflops"] = case.flops / us / 1e6
    peers = judged.get("peers")
    if isinstance(peers, dict):
        judged["times_faster"] = {name: other / us for name, other in peers.items() if isinstance(other, float)}
    if case.flops and rate not in ceilings:
        return judged
    by_bytes = case.num_bytes / ceilings["copy_bytes_per_s"] * 1e6
    by_flops = case.flops / ceilings[rate] * 1e6 if case.flops else 0.0
    judged["floor_us"] = max(by_bytes, by_flops)
    judged["bound"] = "bytes" if by_bytes >= by_flops else "flops"
    judged["share"] = max(by_bytes, by_flops) / us
    if case.goal is not None:
        judged["goal"] = case.goal
        if case.exception:
            judged["exception"] = case.exception
        else:
            judged["goal_reached"] = judged["share"] >= case.goal
    return judged


def table(results: Mapping[str, Result]) -> str:
    """One line per case."""
    lines = [f"{'case':<48} {'status':<8} {'error':>8} {'us':>9} {'GB/s':>6} {'TF/s':>6} {'of roof':>8}  goal, peers"]
    for name, result in results.items():
        us = result.get("tuned_us", result.get("us"))
        notes = []
        if "goal_reached" in result:
            notes.append(f"{'reached' if result['goal_reached'] else 'missed'} {result['goal']:.0%}")
        if "exception" in result:
            notes.append(str(result["exception"]))
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
    """How many passed, failed, were left out and were cut off."""
    names: Sequence[object] = [result["status"] for result in results.values()]
    return ", ".join(f"{names.count(status)} {status}" for status in ("PASS", "FAIL", "SKIPPED", CUT))


def write(path: pathlib.Path, record: Record) -> None:
    """Writes everything, under a temporary name first."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(json.dumps({"schema": SCHEMA, **record._asdict()}, indent=1) + "\n")
    partial.replace(path)


def read(path: pathlib.Path, conditions: Mapping[str, object]) -> Record:
    """What an earlier run left at `path`, if it was cut off or did only a part, under the same conditions; else nothing."""
    empty = Record(dict(conditions), {}, {}, [])
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return empty
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        return empty
    record = Record(*(found[name] for name in Record._fields))
    if any(record.conditions.get(name) != value for name, value in conditions.items()):
        return empty
    # What failed is tried again.
    kept = {name: result for name, result in record.results.items() if result["status"] != "FAIL"}
    return record._replace(results=kept)
