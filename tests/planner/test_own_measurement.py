"""Users' own measurements replace published shares."""

from __future__ import annotations

import json
import pathlib

import pytest

from step3_jax.cli.main import main
from step3_jax.planner.own_measurement import GPU_CHECK_SCHEMA, read_measurement
from tools.gpu_check import report as gpu_check_report
from tools.gpu_check.cases import all_cases


def results(**changes: object) -> dict[str, object]:
    """A results.json as a GPU check writes it."""
    good = {"status": "PASS", "us": 100.0}
    return {
        "schema": GPU_CHECK_SCHEMA,
        "conditions": {"mode": "gpu", "gpu": "NVIDIA H200, 575.1, 143771 MiB, 9.0"},
        "ceilings": {"copy_bytes_per_s": 4.1e12},
        "results": {
            "mfa_decode/fp8/64x8192": good | {"gb_per_s": 3840.0, "tflops": 490.0},
            "mfa_decode/fp8/1x32768": good | {"gb_per_s": 100.0, "tflops": 10.0},
            "mfa_decode/fp8/64xragged": good | {"gb_per_s": 100.0, "tflops": 10.0},
            "moe_ffn/fp8/1024x6of48/uniform": good | {"gb_per_s": 2400.0, "tflops": 989.5},
            "fp8_matmul/64x2048x7168": good | {"gb_per_s": 1.0, "tflops": 1.0},
        },
        "log": [],
        **changes,
    }


def bench() -> dict[str, object]:
    """A file of `step3 bench decode --json`."""
    rows = [{"dtype": "bfloat16", "batch": 1, "gb_per_s": 71.68}, {"dtype": "bfloat16", "batch": 8, "gb_per_s": 35.0}]
    return {"is_partial": False, "conditions": {"device": "cpu"}, "model": {}, "decode": rows, "prefill": []}


def write(folder: pathlib.Path, found: object) -> str:
    file = folder / "results.json"
    file.write_text(json.dumps(found))
    return str(file)


def test_the_schema_is_that_of_the_gpu_check() -> None:
    assert GPU_CHECK_SCHEMA == gpu_check_report.SCHEMA


def test_the_names_of_cases_that_are_read_are_those_of_the_gpu_check() -> None:
    assert {"mfa_decode/fp8/64x8192", "moe_ffn/fp8/1024x6of48/uniform"} <= {
        case.name for case in all_cases("gpu", is_quick=False)
    }


def test_kernels_are_taken_as_shares_of_the_data_sheet(tmp_path: pathlib.Path) -> None:
    found = read_measurement(write(tmp_path, results()), context_tokens=8192)
    assert found.hardware.name == "h200-sxm"
    assert not found.is_whole_engine
    assert found.attention == {"fp8": pytest.approx(3840 / 4800)}
    assert found.ffn == pytest.approx(0.5)


def test_a_bench_is_a_share_of_the_bandwidth(tmp_path: pathlib.Path) -> None:
    found = read_measurement(write(tmp_path, bench()), "cpu-2-socket", context_tokens=8192)
    assert found.is_whole_engine
    assert found.ffn == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("found", "name", "message"),
    [
        (results(schema=1), None, "has schema 1, and 2 is needed"),
        (results(conditions={"mode": "interpret"}), None, "of mode 'interpret'"),
        (results(), "h100", "is for NVIDIA H200.*other hardware"),
        (results(results={}), None, "has no time of mfa_decode"),
        (bench(), None, "give --measured NAME="),
        ({"throughput": {}}, None, "step3 bench decode --json"),
        ([1], None, "a JSON object is needed"),
    ],
)
def test_what_cannot_be_used_is_refused_with_what_to_do(
    tmp_path: pathlib.Path, found: object, name: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_measurement(write(tmp_path, found), name, context_tokens=8192)


def test_a_missing_file_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="there is no such file"):
        read_measurement(str(tmp_path / "none.json"), context_tokens=8192)


def test_the_commands_expectation_follows_the_users_own_run(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "plan",
        "cost",
        "--hardware",
        "h200,cpu-2-socket",
        "--price",
        "h200=2",
        "--price",
        "cpu-2-socket=1",
        "--json",
    ]

    def run(*more: str) -> dict[str, object]:
        assert main([*words, *more]) == 0
        return json.loads(capsys.readouterr().out)

    before = run()
    assert "nothing on a GPU" in str(before["measured"])
    after = run("--measured", write(tmp_path, results()))
    assert after["attention_usd_per_million_tokens"] == before["attention_usd_per_million_tokens"]
    assert "results.json" in str(after["expected_attention_share_source"])
    # 80 % of the data sheet by the kernel, of which 67 % are left around kernels in 2A2F.
    assert after["expected_attention_share"] == pytest.approx(0.8 * 0.671, abs=0.002)
    own = run("--measured", f"cpu-2-socket={write(tmp_path, bench())}", "--attention-hardware", "cpu-2-socket")
    assert own["expected_attention_share"] == pytest.approx(0.1)
