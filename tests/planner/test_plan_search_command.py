"""`step3 plan search`: what it prints, writes and draws, and how it ends."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

from step3_jax.cli.main import main
from step3_jax.launch.place import read_need
from step3_jax.layout.deployment import load_deployment

ROOT = pathlib.Path(__file__).resolve().parents[2]
FEW = ["plan", "search", "--hardware", "h800:16", "--context", "4k"]


def test_it_answers_without_jax_and_names_its_sources() -> None:
    script = (
        "import sys; from step3_jax.cli.main import main\n"
        "code = main(sys.argv[1:])\n"
        "assert 'jax' not in sys.modules and 'matplotlib' not in sys.modules\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script, *FEW], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "target: 50 ms a token, by expected times; inventory: 16 h800" in done.stdout
    assert "fewest devices: " in done.stdout
    assert "Binds: " in done.stdout
    assert "measured: nothing on a GPU" in done.stdout
    assert "h800: 2 USD an hour (arXiv 2507.19427, Table 4)" in done.stdout


def test_the_object_has_the_best_the_fewest_and_the_fronts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FEW, "--json", "--top", "2"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["meets_target"] is True
    assert found["ranked_by"] == "usd"
    assert len(found["best"]) == 2
    assert (
        found["best"][0]["expected"]["usd_per_million_tokens"] > found["best"][0]["ideal"]["usd_per_million_tokens"] > 0
    )
    assert found["fewest_devices"]["devices"] <= found["best"][0]["devices"]
    assert set(found["fronts"]) == {"afd", "ep"}
    assert {one["kind"] for one in found["fronts"]["afd"]} == {"afd"}
    assert found["inventory"][0]["sources"]["bandwidth_tb_s"]
    assert all(one["busiest_experts_over_mean"] >= 1 for one in found["best"])


@pytest.mark.parametrize(
    ("only", "launched", "processes"),
    [("1a1f", ["generate", "--afd", "{}"], 16), ("ep16", ["generate", "--config", "{}"], 16)],
    ids=["apart", "both"],
)
def test_the_file_of_the_best_is_planned_and_launched(
    only: str, launched: list[str], processes: int, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "best.yaml"
    assert main([*FEW, "--hardware", "h20:16", "--only", only, "--output", str(file)]) == 0
    assert main(["plan", "memory", str(file), "--no-compile", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert planned["fits"] is True
    assert planned["workload"]["sequences"] == load_deployment(file).workload.sequences
    config = tmp_path / "config.yaml"
    config.write_text(f"deployment: {file}\n")
    words = [word.format(file if "--afd" in launched else config) for word in launched]
    need = read_need(words)
    assert need is not None
    assert need.processes() == processes


def test_a_front_is_drawn(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    for name, start in (("front.svg", b"<?xml"), ("front.png", b"\x89PNG")):
        file = tmp_path / name
        assert main([*FEW, "--picture", str(file)]) == 0
        assert file.read_bytes().startswith(start)
    text = (tmp_path / "front.svg").read_text()
    assert "attention and FFN apart (AFD), expected" in text
    assert "every device does both (EP, TP), ideal" in text
    assert "USD per million tokens" in text
    assert "wrote" in capsys.readouterr().err


def test_a_target_that_nothing_meets_is_exit_code_1(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "best.yaml"
    assert main([*FEW, "--target-ms", "2", "--output", str(file)]) == 1
    text = capsys.readouterr().out
    assert "NOTHING MEETS THE TARGET" in text
    assert "nearest: " in text
    assert "limit: target time per token; the step: " in text
    assert "would be met: --target-ms " in text
    assert not file.exists()
    assert main([*FEW, "--target-first-token-s", "0.01"]) == 1
    assert "would be met: --target-first-token-s " in capsys.readouterr().out
    assert main(["plan", "search", "--hardware", "h800:4"]) == 1
    assert "NOTHING FITS THE MEMORY" in capsys.readouterr().out
    assert main([*FEW, "--only", "9a9f"]) == 1
    assert "NO DEPLOYMENT" in capsys.readouterr().out


def test_a_trace_gives_the_contexts(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text('{"prompt_tokens": 4000, "output_tokens": 400}\n{"prompt_tokens": 100, "output_tokens": 1000}\n')
    assert main(["plan", "search", "--hardware", "h800:16", "--trace", str(file)]) == 0
    assert "contexts of trace.jsonl: " in capsys.readouterr().out


def test_without_a_price_the_order_is_by_speed_and_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "search", "--hardware", "h100-sxm:16", "--context", "4k"]) == 0
    text = capsys.readouterr().out
    assert "best tokens/s/device first" in text
    assert "give it with --price h100-sxm=USD" in text
    assert main(["plan", "search", "--hardware", "h100-sxm:16", "--context", "4k", "--price", "h100-sxm=2.5"]) == 0
    assert "2.5 USD an hour (given with --price)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give the devices you have"),
        (["--hardware", "h800"], "HARDWARE:COUNT"),
        (["--hardware", "h800:0"], "at least 1"),
        (["--hardware", "h80:8"], "did you mean h800"),
        (["--hardware", "h800:8,h800:8"], "names h800 twice"),
        (["--hardware", "h800:8", "--model", "dsv3"], "step3 plan cost --model dsv3"),
        (["--hardware", "h800:8", "--model", "step4"], "did you mean step3"),
        (["--hardware", "h800:8", "--context", "128k"], "131,072 tokens"),
        (["--hardware", "h800:8", "--trace", "none.jsonl"], "none.jsonl cannot be read"),
        (["--hardware", "h800:8", "--target-ms", "0"], "the target of a token is 0 s"),
        (["--hardware", "h800:8", "--target-first-token-s", "nan"], "the target of the first token is nan s"),
        (["--hardware", "h800:8", "--max-num-batched-tokens", "0"], "chunks of 0 tokens"),
        (["--hardware", "h800:8", "--memory-share", "1.5"], "the share of the memory is 1.5"),
        (["--hardware", "h800:8", "--only", "2b2f"], "--only 2b2f"),
        (["--hardware", "h800:8", "--top", "0"], "--top 0"),
        (["--hardware", "h800:8", "--picture", "front.gif"], "has to end in .svg or .png"),
        (["--hardware", "h800:8", "--output", "best.json"], "ends in .yaml"),
        (["--hardware", "h800:8", "--price", "h800=0"], "--price"),
    ],
)
def test_mistakes_are_exit_code_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "search", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("page", "words"),
    [
        (
            "docs/start.md",
            ["--hardware", "h800:32", "--hardware", "h20:64", "--context", "8k", "--text-only", "--top", "1"],
        ),
        ("docs/planning.md", ["--hardware", "h800:64", "--hardware", "h20:64", "--context", "8k", "--text-only"]),
    ],
)
def test_the_pages_show_what_the_command_prints(
    page: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    block = next(block for block in text.split("```") if "s/first" in block)
    assert main(["plan", "search", *words]) == 0
    printed = capsys.readouterr().out
    # Other commands' outputs come before and after it.
    part = next(part for part in block.split("...\n") if "s/first" in part)
    rows = part[part.index("   deployment") :].splitlines()
    assert len(rows) >= 3
    assert all(row in printed for row in rows)


@pytest.mark.parametrize(
    ("words", "row"),
    [
        (["--hardware", "h800:32", "--context", "4k", "--only", "2a2f"], "6,672 sequences, 49.9 ms, 4,179"),
        (["--hardware", "h800:48", "--context", "8k", "--only", "4a2f"], "6,624 sequences, 49.7 ms, 2,778"),
        (["--hardware", "h800:144", "--context", "32k", "--only", "16a2f"], "7,296 sequences, 49.0 ms, 1,033"),
    ],
    ids=["2A2F", "4A2F", "16A2F"],
)
def test_the_published_deployments_are_told_as_they_come_out(
    words: list[str], row: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert row in (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
    assert main(["plan", "search", *words, "--text-only", "--json"]) == 0
    (best,) = json.loads(capsys.readouterr().out.splitlines()[-1])["best"]
    expected = best["expected"]
    cells = (
        f"{best['sequences']:,}",
        f"{expected['step_s'] * 1e3:.1f} ms",
        f"{expected['tokens_per_s_per_device']:,.0f}",
    )
    assert all(cell in row for cell in cells)


def test_what_a_user_measured_takes_the_place_of_published_shares(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"dtype": "bfloat16", "batch": 1, "gb_per_s": 1675.0}]
    file = tmp_path / "decode.json"
    file.write_text(
        json.dumps({"is_partial": False, "conditions": {"device": "gpu"}, "model": {}, "decode": rows, "prefill": []})
    )
    assert main([*FEW, "--json", "--only", "ep16", "--measured", f"h800={file}"]) == 0
    (best,) = json.loads(capsys.readouterr().out.splitlines()[-1])["best"]
    assert best["expected"]["shares"]["attention"] == pytest.approx(0.5)
    assert best["expected"]["is_measured"] is True
