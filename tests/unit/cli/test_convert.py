"""`step3 convert`: what it prints, and its exit codes."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from step3_jax.checkpoint.load import load_model
from step3_jax.cli import convert
from step3_jax.cli.arguments.convert import parse_bytes
from step3_jax.cli.main import main

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def step3(capsys, small_process):
    """Runs a command: exit code, and what it printed."""

    def run(*argv):
        code = main([str(word) for word in argv])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_there_and_back_and_verified(goldens, tmp_path, step3):
    code, out, err = step3("convert", goldens / "tiny_fp8", tmp_path / "orbax", "--verify")
    assert (code, err) == (0, "")
    assert "released layout, block-FP8, 74 tensors" in out
    assert "Orbax, 74 tensors" in out
    assert "verified  74 tensors exact" in out
    code, out, err = step3("convert", tmp_path / "orbax", tmp_path / "back", "--shard-size", "500KB")
    assert (code, err) == (0, "")
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 4
    right, found = (
        load_model(folder, "float32", quantization="none").text.lm_head.weight[...]
        for folder in (goldens / "tiny_fp8", tmp_path / "back")
    )
    np.testing.assert_array_equal(found, right)


def test_fp8_error_is_reported(goldens, tmp_path, step3):
    report = tmp_path / "report.jsonl"
    code, out, _ = step3(
        "convert", goldens / "tiny_text", tmp_path / "out", "--to", "hf", "--dtype", "fp8", "--report", report
    )
    assert code == 0
    assert "rounding  relative RMS" in out
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    fp8 = {line["tensor"]: line for line in lines}["model.layers.1.moe.gate_proj.weight"]
    assert 0.01 < fp8["relative_rms_error"] < 0.04
    assert fp8["largest_error"] > 0


def test_dry_run_writes_nothing(goldens, tmp_path, step3):
    code, out, err = step3(
        "convert", goldens / "tiny_text", tmp_path / "out", "--dtype", "fp8", "--to", "hf", "--dry-run"
    )
    assert (code, err) == (0, "")
    assert "cast 17, quantise 38" in out
    assert "1 file\n" in out
    assert list(tmp_path.iterdir()) == []


def test_verify_alone_finds_what_is_wrong(goldens, tmp_path, step3):
    assert step3("convert", goldens / "tiny_text", tmp_path / "out")[0] == 0
    code, out, _ = step3("convert", goldens / "tiny_text", tmp_path / "out", "--verify")
    assert code == 0
    assert "only comparing" in out
    chunk = tmp_path / "out" / "weights" / "text.norm.weight" / "0"
    chunk.write_bytes(bytes(chunk.stat().st_size))
    code, out, _ = step3(
        "convert", goldens / "tiny_text", tmp_path / "out", "--verify", "--report", tmp_path / "report"
    )
    assert code == 1
    assert "DIFFERS" in out
    assert "model.norm.weight" in out
    wrong = [json.loads(line) for line in (tmp_path / "report").read_text().splitlines()]
    assert [line["tensor"] for line in wrong if line["wrong_bytes"]] == ["model.norm.weight"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "out"], "there is no folder nowhere"),
        (["GOLDENS/tiny_text", "out", "--max-memory", "1MB"], "--max-memory is 1 MiB"),
        (["GOLDENS/tiny_text", "out", "--max-memory", "much"], "is not a size"),
        (["GOLDENS/tiny_text", "out", "--dtype", "int4"], "invalid choice"),
        (["GOLDENS/tiny_text", "."], "exists; give another folder"),
    ],
)
def test_a_mistake_is_one_line(goldens, tmp_path, monkeypatch, step3, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "something").write_text("")
    code, _, err = step3("convert", *(word.replace("GOLDENS", str(goldens)) for word in arguments))
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_resume_is_named_where_it_is_needed(goldens, tmp_path, step3):
    (tmp_path / "out.partial").mkdir()
    code, _, err = step3("convert", goldens / "tiny_text", tmp_path / "out")
    assert code == 2
    assert "--resume" in err
    assert step3("convert", goldens / "tiny_text", tmp_path / "out", "--resume")[0] == 0
    code, out, _ = step3("convert", goldens / "tiny_text", tmp_path / "out", "--resume")
    assert code == 0
    assert "nothing was left to do" in out


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GiB", 4 * 2**30), ("5GB", 5 * 10**9), ("1.5 kb", 1500), ("7", 7), ("512M", 512 * 10**6), ("2kib", 2048)],
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "4XB", "1e9", "4 iB"])
def test_what_is_not_a_size(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a size"):
        parse_bytes(text)


def test_the_tool_is_the_command(goldens, tmp_path):
    command = [
        sys.executable,
        "tools/convert_checkpoint.py",
        str(goldens / "tiny_text"),
        str(tmp_path / "out"),
        "--dry-run",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Orbax, 55 tensors" in done.stdout


def test_an_interrupt_says_how_to_go_on(goldens, tmp_path, step3, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "convert", interrupt)
    code, _, err = step3("convert", goldens / "tiny_text", tmp_path / "out")
    assert code == 130
    assert err.startswith("step3: interrupted; ")
    assert "--resume" in err
    assert err.count("\n") == 1
