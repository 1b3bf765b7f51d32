"""`step3 bench throughput` and `step3 bench latency`: options, report and file; no test asserts a time."""

from __future__ import annotations

import json
import pathlib

import pytest

from step3_jax.cli import bench, bench_engine
from step3_jax.cli.main import main

FEW = ["--preset", "tiny", "--rounds", "1", "--max-num-batched-tokens", "64"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["throughput", "--rounds", "0"], "--rounds is 0"),
        (["throughput", "--requests", "0"], "0 requests"),
        (["throughput", "--prompt-tokens", "8"], "such as 16:256"),
        (["throughput", "--output-tokens", "9:3"], "output tokens are 9 to 3"),
        (["throughput", "--lengths", "no-such-file.jsonl"], "no-such-file.jsonl"),
        (["throughput", "--max-num-seqs", "0"], "max_num_seqs is 0"),
        (["latency", "--arriving", "0"], "--arriving is 0"),
    ],
)
def test_a_mistake_is_told_before_anything_is_measured(options, said, capsys):
    assert main(["bench", *options]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow  # It runs all benches of the engine.
def test_benches_write_their_sections_to_one_file(tmp_path: pathlib.Path, capsys, monkeypatch):
    # With one layer less it compiles in half the time.
    monkeypatch.setitem(bench.PRESETS, "tiny", (128, 1))
    monkeypatch.setattr(bench_engine, "_MEMORY_MODEL", (128, 1))
    file, lengths = tmp_path / "engine.json", tmp_path / "lengths.jsonl"
    lengths.write_text('{"prompt_tokens": 9, "output_tokens": 4}\n{"prompt_tokens": 3, "output_tokens": 2}\n')
    assert main(["bench", "throughput", *FEW, "--lengths", str(lengths), "--json", str(file)]) == 0
    assert "| engine |" in capsys.readouterr().out
    latency = ["--prompt", "8", "--output", "4", "--arriving", "100", "--cached", "640"]
    assert main(["bench", "latency", *FEW, *latency, "--json", str(file)]) == 0
    # A prompt may be longer than the preset's context.
    scaling = ["--scaling", "--sequences", "1", "--prompts", "4100", "--memory-requests", "2,3"]
    assert main(["bench", "throughput", *FEW, *scaling, "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert set(found) == {"throughput", "latency", "scaling"}
    for section in found.values():
        assert section["conditions"]["preset"] == "tiny"
        assert section["conditions"]["engine"]["max_num_batched_tokens"] == 64
    assert found["throughput"]["requests"]["output_tokens"] == 6
    assert [row["max_num_batched_tokens"] for row in found["latency"]["arrival"]] == [8, 64]
    assert found["latency"]["cached"]["cached_tokens"] == 576
    assert found["latency"]["stream_interval"] == 1
    assert [row["sequences"] for row in found["scaling"]["sequences"]] == [1]
    assert [row["prompt_tokens"] for row in found["scaling"]["prompts"]] == [4100]
    assert [row["requests"] for row in found["scaling"]["memory"]] == [2, 3]


def test_pytorch_runs_the_same_requests_in_static_batches(tmp_path: pathlib.Path):
    pytest.importorskip("torch")
    file = tmp_path / "engine.json"
    options = ["--requests", "3", "--prompt-tokens", "2:6", "--output-tokens", "1:3", "--torch", "--json", str(file)]
    assert main(["bench", "throughput", *FEW, *options]) == 0
    found = json.loads(file.read_text())["throughput"]
    assert [row["side"] for row in found["throughput"]] == ["engine", "replay", "torch float32"]
    assert found["logits_error"]["float32"] < 1e-4
    assert found["times_torch"]["float32"] > 0
