"""`step3 plan cost` on the command line."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

from step3_jax.cli.main import main

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAIR = ["--model", "step3", "--attention-hardware", "h20", "--ffn-hardware", "h800"]


def run(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, object]:
    assert main(["plan", "cost", *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize(("context", "total"), [("8k", 0.055), ("8192", 0.055), ("32K", 0.129), ("32_768", 0.129)])
def test_the_reports_prices_are_in_the_json(capsys: pytest.CaptureFixture[str], context: str, total: float) -> None:
    found = run(capsys, *PAIR, "--context", context)
    assert found["total_usd_per_million_tokens"] == pytest.approx(total, abs=0.0005)
    parts = [found["attention_usd_per_million_tokens"], found["ffn_usd_per_million_tokens"]]
    assert sum(parts) == pytest.approx(found["total_usd_per_million_tokens"])
    assert found["expected_total_usd_per_million_tokens"] > 2 * total
    assert found["attention_bound_by"] == "compute"


def test_an_integer_is_meant_literally(capsys: pytest.CaptureFixture[str]) -> None:
    exact, short = (run(capsys, *PAIR, "--context", context) for context in ("8000", "8k"))
    assert exact["context_tokens"] == 8000
    assert exact["kv_bytes_per_token"] < short["kv_bytes_per_token"]


def test_the_best_published_run_comes_back_at_its_own_conditions(capsys: pytest.CaptureFixture[str]) -> None:
    found = run(capsys, "--context", "4k", "--attention-hardware", "h800", "--ffn-hardware", "h800")
    assert found["tokens_per_s_per_device"] == pytest.approx(13239, rel=1e-3)
    assert found["expected_tokens_per_s_per_device"] == pytest.approx(4039, rel=1e-3)


def test_every_figure_has_its_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "cost", *PAIR]) == 0
    text = capsys.readouterr().out
    assert "h20: 0.8 USD an hour (arXiv 2507.19427, Table 4)" in text
    assert "nothing on a GPU" in text
    assert "Table 8, 2A2F" in text


def test_what_was_measured_of_processors_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "cost", "--hardware", "cpu-2-socket-384gb"]) == 0
    text = capsys.readouterr().out
    assert "Measured: nothing on a GPU; with this project the shares of a processor's rates, on another" in text
    assert "float32 operations a cycle" in text


def test_a_missing_price_is_said_and_devices_are_ranked_by_speed(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--hardware", "h100,h200"]
    assert main(["plan", "cost", *words]) == 0
    text = capsys.readouterr().out
    assert "no price" in text
    assert "Ranked by tokens/s" in text
    found = run(capsys, *words)
    assert found["total_usd_per_million_tokens"] is None
    assert found["ranked_by"] == "tokens_per_s"
    priced = run(capsys, *words, "--price", "h100=2", "--price", "h200=9")
    assert priced["ranked_by"] == "usd"
    assert priced["attention_hardware"] == "h100-sxm"


def test_a_context_beyond_the_models_positions_is_arithmetic_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "cost", "--context", "128k"]) == 0
    assert "longer than the model's 65,536 positions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "step4"], "did you mean step3? Known:"),
        (["--attention-hardware", "h8000"], "did you mean h800? Known:"),
        (["--context", "0"], "at least 1"),
        (["--context", "8q"], "no unit q; known: k, m"),
        (["--context", "many"], "such as 16384 or 16k"),
        (["--context", "1.5"], "a whole number"),
        (["--price", "2"], "give NAME="),
        (["--price", "h20=free"], "a number above 0"),
        (["--price", "h20=0"], "a number above 0"),
        (["--price", "h9=1"], "no hardware h9"),
        (["--kv-dtype", "fp7"], "invalid choice"),
        (["--measured", "none.json"], "no such file"),
    ],
)
def test_mistakes_are_exit_code_2_with_what_is_allowed(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "cost", *words]) == 2
    assert message in capsys.readouterr().err


def test_cost_and_report_do_not_import_jax() -> None:
    program = (
        "import sys\n"
        "from step3_jax.cli.main import main\n"
        "assert main(['plan', 'cost', '--json']) == 0\n"
        "assert main(['plan', 'report', '--brief']) == 0\n"
        "found = {'jax', 'jaxlib', 'flax', 'numpy'} & set(sys.modules)\n"
        "assert not found, found\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL, timeout=60)


@pytest.mark.parametrize(
    ("page", "words"),
    [
        (
            "docs/start.md",
            ["--attention-hardware", "h20", "--ffn-hardware", "h800", "--hardware", "h800", "--context", "8k"],
        ),
        ("docs/planning.md", ["--attention-hardware", "h20", "--ffn-hardware", "h800", "--context", "8k"]),
    ],
)
def test_the_pages_show_what_the_command_prints(
    page: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    block = next(block for block in text.split("```") if "apart (AFD)" in block)
    assert main(["plan", "cost", *words]) == 0
    printed = capsys.readouterr().out
    rows = [line for line in block.splitlines() if " ideal " in line or " expected " in line]
    assert len(rows) >= 4
    assert all(row in printed for row in rows)
