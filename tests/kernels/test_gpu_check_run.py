"""How a run of tools/gpu_check goes: its order, its children, how slow, silent, wrong and killed cases are handled."""

from __future__ import annotations

import json
import math
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from pallas_kernels.common import ENVIRONMENT_VARIABLE
from step3_jax.gpu import MEMORY_SHARE, POOL_VARIABLES
from tests.process import environment
from tools.gpu_check import __main__ as gpu_check
from tools.gpu_check import cases, order, parent, rank, report
from tools.gpu_check.case import Case
from tools.gpu_check.order import ANSWERS, FIRST, STEP, Stage
from tools.gpu_check.rank_model import RankModel, small_sizes

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Stands in for the child: a case's name says what it does.
CHILD = """
import json, os, sys, time

def tell(event, **message):
    print(json.dumps({"event": event, "name": name, **message}), flush=True)

phase, names = sys.argv[1], sys.argv[2:]
for name in names:
    tell("start")
    print("some library's own words", flush=True)
    if "partial" in name:
        tell("partial", status="PASS", us=5.0)
    if "silent" in name:
        time.sleep(600)
    if "works" in name:
        for _ in range(8):
            tell("doing", doing="a part")
            time.sleep(0.5)
    if "asks" in name:
        tell("doing", doing="a long part", allowed_s=60.0)
        time.sleep(4)
    if "dies" in name:
        os._exit(3)
    result = {"status": "FAIL" if "wrong" in name else "PASS"}
    if phase == "rates":
        result["ceilings"] = {"copy_bytes_per_s": 1e12, "bf16_flops": 1e15}
    if phase == "more_rates":
        result["ceilings"] = {"fp8_flops": 2e15}
    if phase in ("time", "sweep"):
        result["us" if phase == "time" else "tuned_us"] = 100.0
    tell("result", **result)
"""


@pytest.fixture
def children(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[parent.Children]:
    script = tmp_path / "child.py"
    script.write_text(CHILD)

    def command(_: object, names: list[str], phase: str, *rest: object) -> list[str]:
        return [sys.executable, str(script), phase, *names]

    monkeypatch.setattr(parent.Children, "_command", command)
    monkeypatch.setitem(parent.SILENCE_SECONDS, "gpu", 3.0)
    made = parent.Children(settings(tmp_path))
    yield made
    made.end()


def settings(folder: pathlib.Path, seconds: float = 300.0) -> parent.Settings:
    return parent.Settings("gpu", folder, folder / "cache", folder / "tuning.json", time.time() + seconds)


def results(children: parent.Children, *lanes: tuple[str, ...], phase: order.Phase = "check") -> dict[str, dict]:
    stage = Stage(phase, lanes)
    return {name: result for name, result, is_all in children.run(stage, deadline=math.inf) if is_all}


def test_a_silent_child_and_a_dead_one_fail_their_case_and_the_rest_runs(children: parent.Children) -> None:
    found = results(children, ("a", "silent", "b", "dies", "c"))
    statuses = [found[name]["status"] for name in ("a", "silent", "b", "dies", "c")]
    assert statuses == ["PASS", "FAIL", "PASS", "FAIL", "PASS"]
    assert "silent for 3 s" in found["silent"]["reason"]
    assert "ended with 3" in found["dies"]["reason"]


def test_a_child_that_works_or_has_asked_for_time_is_left_alone(children: parent.Children) -> None:
    found = results(children, ("works", "asks"))
    assert [found[name]["status"] for name in ("works", "asks")] == ["PASS", "PASS"]


def test_lanes_run_at_once_and_a_hang_on_one_holds_up_no_other(children: parent.Children) -> None:
    found = results(children, ("silent", "a"), ("b",), ("c", "wrong"))
    assert list(found)[-2:] == ["silent", "a"]
    assert set(found) == {"silent", "a", "b", "c", "wrong"}


def test_what_a_child_has_told_before_it_hung_holds(children: parent.Children) -> None:
    found = results(children, ("partial-silent",), phase="time")["partial-silent"]
    assert (found["status"], found["us"]) == ("PASS", 5.0)
    assert "silent" in found["reason"]


def test_compiled_programs_lie_outside_the_results(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("JAX_COMPILATION_CACHE_DIR", *POOL_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    args = gpu_check._parser().parse_args(["--out", str(tmp_path)])
    assert tmp_path not in args.cache.parents
    made = parent.Children(settings(tmp_path))
    assert made._environment("op")["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "cache")
    # The step fills the GPU: its pool is what the engine's is.
    assert "XLA_CLIENT_MEM_FRACTION" not in made._environment("op")
    assert made._environment(STEP)["XLA_CLIENT_MEM_FRACTION"] == str(MEMORY_SHARE)


def test_what_still_runs_at_the_end_is_cut_off(
    children: parent.Children, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(parent.SILENCE_SECONDS, "gpu", 60.0)
    late = parent.Children(settings(tmp_path, seconds=2.0))
    found = results(late, ("silent", "never"))
    assert found["silent"]["status"] == "SKIPPED"
    assert "cut off" in found["silent"]["reason"]
    assert "never" not in found


@pytest.fixture
def gpu(children: parent.Children, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that claims to have a GPU, and children that report that all is well."""
    conditions = {"mode": "gpu", "gpu": "a GPU, 9.0", "sources": "1"}
    monkeypatch.setattr(gpu_check, "_conditions", lambda mode, is_quick: dict(conditions))
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: "/bin/true")
    monkeypatch.setattr(gpu_check.torch_peers, "measure", lambda seconds: "not installed")


def written(folder: pathlib.Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "results.json").read_text())
    assert found["schema"] == report.SCHEMA
    return found


def done(folder: pathlib.Path) -> list[tuple[str, str]]:
    return [(entry["phase"], entry["name"]) for entry in written(folder)["log"]]


@pytest.mark.usefixtures("gpu")
def test_the_first_part_and_then_the_rest_do_each_thing_once(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "out"
    assert gpu_check.main(["--out", str(out), "--first"]) == 0
    first = done(out)
    phases = [phase for phase, _ in first]
    assert first[0] == ("rates", FIRST)
    assert first[-1] == ("time", STEP)
    assert phases == sorted(phases, key=["rates", "check", "time"].index)
    assert {name for phase, name in first if phase == "check"} == set(order.FORMS)
    assert [name for phase, name in first if phase == "time"] == [*order.FIRST_TIMES, STEP]
    planned = written(out)["results"]["mfa_decode/fp8/64x8192/planned"]
    assert planned["share"] > 0
    # Nothing is judged by a rate that is not known yet.
    assert "share" not in written(out)["results"]["fp8_matmul/4096x7168x16384"]

    assert gpu_check.main(["--out", str(out), "--rest"]) == 0
    both = done(out)
    assert both[: len(first)] == first
    assert len(set(both)) == len(both)
    every = {case.name: case for case in cases.all_cases("gpu", is_quick=False)}
    assert {name for phase, name in both if phase == "check"} == {
        ANSWERS,
        *(name for name, case in every.items() if case.tolerance is not None),
    }
    assert {name for phase, name in both if phase == "time"} == {
        STEP,
        *(name for name, case in every.items() if case.is_timed),
    }
    assert {name for phase, name in both if phase == "peers"} == {name for name, case in every.items() if case.peers}
    assert {name for phase, name in both if phase == "sweep"} == {name for name, case in every.items() if case.tuned}
    assert {name for phase, name in both if phase == "check_again"} == set(order.FORMS)
    judged = written(out)["results"]["fp8_matmul/4096x7168x16384"]
    assert judged["goal"] == 1.0
    assert "goal_reached" in judged
    # All of it is done, so another run has nothing to do.
    assert gpu_check.main(["--out", str(out)]) == 0
    assert done(out) == both


@pytest.mark.usefixtures("gpu")
def test_results_of_other_sources_or_another_schema_are_not_gone_on_with(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["--out", str(tmp_path), "--only", "norm_quantise/77"]
    for changed in (None, {"sources": "2"}, {"schema": 1}):
        if changed and "sources" in changed:
            monkeypatch.setattr(gpu_check, "_conditions", lambda mode, is_quick: {"gpu": "a GPU, 9.0", "sources": "2"})
        if changed and "schema" in changed:
            old = written(tmp_path)
            (tmp_path / "results.json").write_text(json.dumps(old | changed))
        before = time.time()
        assert gpu_check.main(command) == 0
        assert (tmp_path / "results.json").stat().st_mtime >= before
        assert done(tmp_path).count(("check", "norm_quantise/77x7168")) == 1


def test_a_case_that_failed_is_done_no_more_and_tried_again_by_the_next_run(tmp_path: pathlib.Path) -> None:
    record = report.Record({"gpu": "x"}, {}, {}, [])
    record.add("op", "check", {"status": "PASS", "error": 0.1}, is_all=True, at=1.0)
    record.add("op", "check_again", {"status": "PASS", "error": 0.05}, is_all=True, at=2.0)
    assert record.results["op"]["error"] == 0.1
    assert record.is_wanted("time", "op")
    record.add("op", "time", {"status": "SKIPPED", "reason": "the time is up"}, is_all=True, at=3.0)
    assert record.is_wanted("time", "op")
    assert record.results["op"]["status"] == "PASS"
    record.add("op", "time", {"status": "PASS", "us": 1.0}, is_all=False, at=3.0)
    assert record.results["op"]["status"] == report.CUT
    record.add("op", "peers", {"status": "FAIL", "reason": "no memory"}, is_all=True, at=4.0)
    assert record.results["op"]["status"] == "PASS"
    record.add("op", "time", {"status": "FAIL", "reason": "wrong"}, is_all=True, at=5.0)
    record.add("op", "sweep", {"status": "PASS"}, is_all=True, at=6.0)
    assert record.results["op"]["status"] == "FAIL"
    assert not record.is_wanted("check", "op")
    report.write(tmp_path / "results.json", record)
    again = report.read(tmp_path / "results.json", {"gpu": "x"})
    assert again.is_wanted("check", "op")
    assert again.log == record.log
    assert report.read(tmp_path / "results.json", {"gpu": "y"}).log == []


def test_forms_and_first_times_are_of_every_kernel_and_each_is_small_or_has_a_goal() -> None:
    every = {case.name: case for case in cases.all_cases("gpu", is_quick=False)}
    assert {every[name].kernel for name in order.FORMS} == {case.kernel for case in every.values()}
    assert all(every[name].tolerance is not None for name in order.FORMS)
    assert all(every[name].is_timed for name in order.FIRST_TIMES)
    assert all(every[name].tuned for name in order.FIRST_SWEEPS)
    stage = order.first(every.values(), "gpu")[1]
    assert len(stage.lanes) == order.LANES
    assert sorted(name for lane in stage.lanes for name in lane) == sorted(order.FORMS)


def test_the_experts_are_compared_with_their_reference_in_both_sizes_of_tile() -> None:
    from pallas_kernels.grouped_matmul.mosaic import tile_rows_for

    sizes = {
        tile_rows_for(int(name.split("/")[2].split("x")[0]) * 3, 48)
        for name in order.FORMS
        if name.startswith("moe_ffn")
    }
    assert sizes == {64, 128}


def test_exceptions_from_the_goals_are_named() -> None:
    every = {case.name: case for case in cases.all_cases("gpu", is_quick=False)}
    excepted = {name for name, case in every.items() if case.exception}
    assert excepted == {"fp8_matmul/64x2048x7168"}
    case: Case = every["fp8_matmul/64x2048x7168"]
    ceilings = {"copy_bytes_per_s": 3e12, "bf16_flops": 8e14, "fp8_flops": 1.3e15}
    judged = report.judge(case, {"status": "PASS", "us": 11.0}, ceilings)
    assert "goal_reached" not in judged
    assert "under 20 MB" in report.table({case.name: judged})
    assert rank.GOAL < rank.MOST == 0.92


@pytest.mark.kernels
def test_the_step_tells_its_time_before_it_measures_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    said: list[str] = []
    told: list[dict[str, object]] = []
    found = rank.measure_step(
        RankModel(small_sizes()),
        lambda doing, allowed_s=None: said.append(doing),
        lambda **known: told.append({**known, "said": len(said)}),
        copy_rate=1e9,
        deadline=math.inf,
    )
    assert found["status"] == "PASS"
    (known,) = told
    assert known["us"] == found["us"] > 0
    assert said[known["said"] :] == ["running steps one by one"]
    assert found["one_by_one_us"] > 0


@pytest.mark.kernels
def test_the_whole_order_on_a_cpu_with_cases_that_are_slow_silent_wrong_and_killed(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-m", "tools.gpu_check", "--interpret", "--rehearse", "--quick", "--out", str(tmp_path)]
    command += ["--only", "fake,fp8_matmul,norm_quantise,swiglu_quantise"]
    run = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False, timeout=600)
    assert run.returncode == 1, run.stdout + run.stderr
    found = written(tmp_path)["results"]
    failed = {name: result for name, result in found.items() if result["status"] == "FAIL"}
    assert set(failed) == {"fake/silent", "fake/wrong", "fake/killed"}
    assert "silent for" in failed["fake/silent"]["reason"]
    assert "above" in failed["fake/wrong"]["reason"]
    assert "ended with -9" in failed["fake/killed"]["reason"]
    assert found["fake/slow"]["status"] == "PASS"
    assert all(found[f"fake/after-{name}"]["status"] == "PASS" for name in ("slow", "silent", "wrong", "killed"))
    phases = [phase for phase, _ in done(tmp_path)]
    assert list(dict.fromkeys(phases)) == ["rates", "check", "time", "more_rates", "check_again", "peers", "sweep"]


@pytest.mark.kernels
def test_a_run_that_is_killed_is_gone_on_with(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-m", "tools.gpu_check", "--interpret", "--rehearse", "--quick", "--out", str(tmp_path)]
    command += ["--only", "fake/silent,norm_quantise"]
    given = environment()
    first = subprocess.Popen(command, cwd=ROOT, env=given, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 240
    while "norm_quantise/7x1024" not in _finished(tmp_path):
        assert time.monotonic() < limit
        assert first.poll() is None
        time.sleep(0.1)
    first.kill()
    first.wait()
    run = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, check=False, timeout=300)
    assert "going on with" in run.stdout, run.stderr
    assert done(tmp_path).count(("check", "norm_quantise/7x1024")) == 1
    assert written(tmp_path)["results"]["fake/silent"]["status"] == "FAIL"


def _finished(folder: pathlib.Path) -> set[str]:
    try:
        return {name for _, name in done(folder)}
    except FileNotFoundError:
        return set()
