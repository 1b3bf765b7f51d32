"""`step3 run-batch` on a small model with random weights."""

from __future__ import annotations

import json
import pathlib
import random
import subprocess
import sys
import time

import pytest

from step3_jax.cli.main import main
from tests.process import ROOT, environment

pytestmark = pytest.mark.usefixtures("private_compile_cache")


def request(number: int) -> dict[str, object]:
    body = {"prompt": f"Word {number}", "max_tokens": 8, "ignore_eos": True}
    return {"custom_id": f"r{number}", "method": "POST", "url": "/v1/completions", "body": body}


def write(path: pathlib.Path, count: int) -> pathlib.Path:
    path.write_text("".join(json.dumps(request(number)) + "\n" for number in range(count)), encoding="utf-8")
    return path


def read_ids(path: pathlib.Path) -> list[str]:
    return [json.loads(line)["custom_id"] for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def test_a_batch_is_answered_and_gone_on_with(
    random_model_path: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, output = write(tmp_path / "in.jsonl", 6), tmp_path / "out.jsonl"
    command = ["run-batch", str(random_model_path), "-i", str(given), "-o", str(output), "--max-num-seqs", "1"]
    assert main(command) == 0
    assert capsys.readouterr().err == "6 requests, 6 of them answered now\n"
    assert sorted(read_ids(output)) == [f"r{number}" for number in range(6)]
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:4]) + lines[4][:9])
    assert main(command) == 0
    assert capsys.readouterr().err == "6 requests, 2 of them answered now\n"
    assert sorted(read_ids(output)) == [f"r{number}" for number in range(6)]
    assert main(command) == 0
    assert capsys.readouterr().err == "6 requests, 0 of them answered now\n"


def test_a_request_with_more_prompts_than_a_service_would_queue_is_answered(
    random_model_path: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    given, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    body = {"prompt": [f"Word {number}" for number in range(40)], "max_tokens": 1}
    entries = [{"custom_id": name, "url": "/v1/completions", "body": body} for name in "ab"]
    given.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    command = ["run-batch", str(random_model_path), "-i", str(given), "-o", str(output), "--max-num-seqs", "1"]
    assert main(command) == 0
    for line in output.read_text(encoding="utf-8").splitlines():
        assert len(json.loads(line)["response"]["body"]["choices"]) == 40


def test_mistakes_are_told_before_a_model_is_loaded(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, output = write(tmp_path / "in.jsonl", 1), tmp_path / "out.jsonl"
    output.write_text('{"custom_id": "other", "response": {}}\n', encoding="utf-8")
    for words, said in (
        (["-i", str(tmp_path / "none"), "-o", str(output)], "none cannot be read: No such file"),
        (["-i", str(given), "-o", str(tmp_path)], "cannot be written: Is a directory"),
        (["-i", str(given), "-o", str(output)], "has an answer to 'other'"),
    ):
        assert main(["run-batch", "no-such-model", *words]) == 2
        printed = capsys.readouterr().err
        assert said in printed
        assert printed.count("\n") == 1


@pytest.mark.slow  # Ten starts of a process with a model.
def test_nothing_is_lost_or_doubled_by_being_killed(random_model_path: pathlib.Path, tmp_path: pathlib.Path) -> None:
    given, output = write(tmp_path / "in.jsonl", 300), tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "step3_jax", "run-batch", str(random_model_path), "-i", str(given)]
    command += ["-o", str(output), "--max-num-seqs", "2"]
    draw = random.Random(0)
    num_killed = 0
    for _ in range(10):
        before = output.stat().st_size if output.exists() else 0
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL)
        end = time.monotonic() + 120
        # It is killed while it writes.
        while process.poll() is None and time.monotonic() < end:
            if output.exists() and output.stat().st_size > before:
                time.sleep(draw.uniform(0, 0.05))
                break
            time.sleep(0.01)
        process.kill()
        num_killed += process.wait() < 0
    assert num_killed > 3
    done = subprocess.run(command, cwd=ROOT, env=environment(), timeout=240, check=False, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert sorted(read_ids(output)) == sorted(f"r{number}" for number in range(300))
