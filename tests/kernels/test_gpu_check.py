"""tools/gpu_check on a machine without a GPU: both CPU modes run to the end, and its own verdicts are right."""

from __future__ import annotations

import json
import math
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import tuning
from pallas_kernels.compat import IS_0_11
from tools import demo
from tools.gpu_check import __main__ as gpu_check
from tools.gpu_check import answers, bare, cases, measure, order, report
from tools.gpu_check.case import Case, row_errors, same_bits
from tools.gpu_check.rank_model import RankModel, RankSizes

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(tmp_path: pathlib.Path, *args: str) -> tuple[int, dict[str, dict[str, object]]]:
    done = subprocess.run(
        [sys.executable, "-m", "tools.gpu_check", "--out", str(tmp_path), *args],
        check=False,
        capture_output=True,
        text=True,
        timeout=1200,
        cwd=ROOT,
    )
    written = tmp_path / "results.json"
    assert written.exists(), done.stdout + done.stderr
    results = json.loads(written.read_text())["results"]
    failed = {name: result for name, result in results.items() if result["status"] == "FAIL"}
    assert not failed, done.stdout
    return done.returncode, results


# Its kernels are interpreted by their own tests too.
@pytest.mark.thorough
def test_interpret_mode_passes_on_a_cpu(tmp_path: pathlib.Path) -> None:
    code, results = run(tmp_path, "--interpret", "--quick", "--first", "--only", "rope_cache_write,fp8_matmul")
    assert code == 0
    assert set(results) == {"ceilings", "fp8_matmul/1x256x256", "fp8_matmul/64x256x256", "rope_cache_write/fp8/7"}
    assert all(result["status"] == "PASS" for result in results.values())
    assert results["rope_cache_write/fp8/7"]["error"] < 3e-2


def test_compile_mode_lowers_on_a_cpu(tmp_path: pathlib.Path) -> None:
    code, results = run(tmp_path, "--compile-only", "--quick", "--only", "rope_cache_write,swiglu_quantise")
    assert code == 0
    assert len(results) == 3


@pytest.mark.kernels
@pytest.mark.parametrize("mode", ["--interpret", "--compile-only"])
def test_every_quick_case_passes_on_a_cpu(tmp_path: pathlib.Path, mode: str) -> None:
    code, results = run(tmp_path, mode, "--quick", "--budget", "280")
    assert code == 0
    assert len(results) >= 9


@pytest.mark.kernels
def test_the_tiny_model_gives_the_answers_that_ship_with_it(tmp_path: pathlib.Path) -> None:
    code, results = run(tmp_path, "--interpret", "--rest", "--only", "tiny_model")
    assert code == 0
    found = results["tiny_model"]
    assert found["status"] == "PASS"
    assert found["equal"] == found["answers"] > 2
    assert found["equal_bfloat16"] > 0


@pytest.mark.parametrize("is_right", [True, False])
def test_an_answer_that_differs_from_the_one_that_ships_fails(is_right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(llm: object, folder: pathlib.Path, example: demo.Example) -> str | None:
        is_last = example.image is None
        return example.answer if is_right or not is_last else "The capital of France is Lyon."

    loaded: list[object] = []
    monkeypatch.setattr("step3_jax.engine.llm.LLM", lambda folder, dtype, **settings: loaded.append(dtype))
    monkeypatch.setattr(demo, "ask", ask)
    said: list[object] = []
    found = answers.answer_questions(
        "interpret", lambda *doing: said.append(doing[0]), lambda **known: None, is_quick=True, deadline=math.inf
    )
    assert loaded == ["float32"]
    assert said == ["loading the tiny model in float32", "question 1 of 2 in float32", "question 2 of 2 in float32"]
    assert found["status"] == ("PASS" if is_right else "FAIL")
    assert found["equal"] == (2 if is_right else 1)
    assert ("'The capital of France is Lyon.' instead of" in str(found["reason"])) is not is_right


@pytest.mark.kernels
@pytest.mark.skipif(not IS_0_11, reason="the interpreter of JAX 0.10 compiles a kernel at every call: over ten minutes")
def test_a_ranks_step_in_the_interpreter_is_that_of_the_references(tmp_path: pathlib.Path) -> None:
    code, results = run(tmp_path, "--interpret", "--budget", "280", "--only", "rank_step")
    assert code == 0
    assert 0 < results["rank_step"]["error"] < 0.2


def test_an_unknown_case_and_a_missing_gpu_are_refused(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        gpu_check.main(["--out", str(tmp_path), "--only", "softmax", "--interpret"])
    assert "no case starts with that" in capsys.readouterr().err
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit):
        gpu_check.main(["--out", str(tmp_path), "--rehearse"])
    assert "--rehearse goes with --interpret" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu_check.main(["--out", str(tmp_path)])
    assert "--interpret and --compile-only run without one" in capsys.readouterr().err


def case(**changes: object) -> Case:
    fields: dict[str, object] = {"name": "op/1", "kernel": "op", "make": lambda seed: (), "run": lambda: None}
    return Case(**{**fields, **changes})


def test_a_time_is_judged_by_what_binds() -> None:
    ceilings = {"copy_bytes_per_s": 1e12, "bf16_flops": 1e14, "fp8_flops": 2e14}
    by_bytes = report.judge(case(num_bytes=10**8, flops=10**9, goal=0.9), {"status": "PASS", "us": 125.0}, ceilings)
    assert by_bytes["bound"] == "bytes"
    assert by_bytes["share"] == pytest.approx(0.8)
    assert by_bytes["goal_reached"] is False
    result = {"status": "PASS", "us": 200.0, "tuned_us": 100.0, "peers": {"xla": 250.0, "cudnn": "not there"}}
    by_flops = report.judge(case(num_bytes=10**6, flops=10**10, rate="fp8"), result, ceilings)
    assert by_flops["bound"] == "flops"
    assert by_flops["share"] == pytest.approx(0.5)
    assert by_flops["times_faster"] == {"xla": 2.5}
    table = report.table({"op/1": by_bytes, "op/2": by_flops})
    assert "missed 90%" in table
    assert "2.50x xla" in table


def test_errors_are_judged_by_row_and_nan_is_an_error() -> None:
    exact = jnp.ones((3, 4))
    assert row_errors(exact.at[1].set(1.1), exact)[0] == pytest.approx(0.1, rel=1e-5)
    assert row_errors(exact.at[2, 0].set(jnp.nan), exact)[0] == np.inf
    assert same_bits(exact, exact)
    assert not same_bits(exact, exact.at[0, 0].set(-1.0))


def test_the_quick_choice_has_every_kernel() -> None:
    every = cases.all_cases("gpu", is_quick=False)
    quick = cases.all_cases("gpu", is_quick=True)
    assert {one.kernel for one in quick} == {one.kernel for one in every}
    assert len({one.name for one in every}) == len(every)


def test_the_forms_that_a_model_in_fp8_runs_are_checked_and_timed() -> None:
    every = cases.all_cases("gpu", is_quick=False)
    for form in ("mfa_decode_quantised/", "/float16", "norm_quantise/", "swiglu_quantise/", "rope_cache_write/fp8/"):
        found = [
            one for one in every if form in one.name and (one.name.endswith("/joined") or "mfa_decode" in one.name)
        ]
        assert any(one.tolerance is not None and one.name in order.FORMS for one in found), form
        assert any(one.is_timed for one in found), form


def test_quantised_heads_are_judged_by_what_they_mean() -> None:
    one = cases.by_name("mfa_decode_quantised/fp8/edges/float16", "interpret")
    inputs = one.make(0)
    values, scales = one.run(*inputs, implementation="reference")
    expected = one.view((values, scales), inputs)
    # The kernel leaves what is past the last row undefined.
    padded = scales.at[:, values.shape[0] :].set(jnp.nan)
    assert row_errors(one.view((values, padded), inputs), expected).max() == 0
    wrong = scales.at[3, 2].multiply(2.0)
    assert row_errors(one.view((values, wrong), inputs), expected).max() > one.tolerance


@pytest.mark.kernels
def test_the_forms_that_a_model_in_fp8_runs_pass_in_the_interpreter(tmp_path: pathlib.Path) -> None:
    joined = "norm_quantise/7x1024/joined,swiglu_quantise/7x512/joined,rope_cache_write/fp8/7/joined"
    code, results = run(tmp_path, "--interpret", "--budget", "280", "--only", f"mfa_decode_quantised,{joined}")
    assert code == 0
    checked = {name: result for name, result in results.items() if name != "ceilings"}
    assert len(checked) == 4
    assert all(result["status"] == "PASS" and "error" in result for result in checked.values())


def test_calls_are_timed_one_after_another_in_one_program() -> None:
    seconds = measure.seconds_per_call(jnp.sin, [(jnp.ones(8),), (jnp.zeros(8),)], runs=2)
    assert 0 < seconds < 1


def test_the_stand_in_for_jaxtyping_takes_any_annotation() -> None:
    module = bare.stand_in()
    assert module.Float[module.Array, "N D"] is module.Int


BARE = """
import importlib.util, sys

real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "jaxtyping" else real(name, *rest)
import tools.gpu_check

assert "Stand-in" in sys.modules["jaxtyping"].__doc__
from tools.gpu_check import cases, rank

case = cases.by_name("swiglu_quantise/7x512", "interpret")
case.run(*case.make(0), implementation="reference")
assert not any(name.split(".")[0] in {"flax", "pytest", "beartype", "yaml"} for name in sys.modules)
few = {"gpu", "sampling", "sampling.speculation"}
assert {name for name in sys.modules if name.startswith("step3_jax.")} == {f"step3_jax.{name}" for name in few}
print("BARE")
"""


def test_the_check_needs_neither_jaxtyping_nor_the_model() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BARE], check=False, capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert "BARE" in done.stdout, done.stderr


def test_blocks_that_were_measured_join_those_that_are_there(tmp_path: pathlib.Path) -> None:
    from tools.gpu_check import child

    for stages in (2, 3):
        child.add_to_tuning(
            tmp_path / "t.json",
            [tuning.Entry(op="gemm", shape={"m": stages}, blocks={"stages": stages}, us=1.0)],
        )
    assert len(json.loads((tmp_path / "t.json").read_text())["entries"]) == 2


def test_a_rank_holds_what_the_model_needs_at_full_depth() -> None:
    model = RankModel(RankSizes())
    weights, cache = jax.eval_shape(lambda: (model.make_weights(), model.make_cache()))
    num_bytes = [sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(part)) for part in (weights, cache)]
    # The o-projection is an eighth as well: 42.5 GB of weights, an eighth of the embedding among them; 16.6 GB of cache for
    # 128 sequences of 4,096 tokens, and room for one more page each.
    assert num_bytes[0] == pytest.approx(42.5e9, rel=0.01)
    assert num_bytes[1] == pytest.approx(16.6e9 * 65 / 64, rel=0.01)
    # Bytes of a step: all of that but the embedding and the room.
    assert model.step_bytes == pytest.approx(num_bytes[0] - 128_815 * 7168 // 8 * 2 + 16.6e9, rel=0.002)
