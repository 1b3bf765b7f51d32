"""The benchmark of conversion and loading: every side runs, and what was converted is checked."""

from __future__ import annotations

import dataclasses
import pathlib
import shutil

import numpy as np
import pytest

from step3_jax.config import ModelConfig
from step3_jax.layout.count import count_parameters
from tools import bench_checkpoint
from tools.bench_checkpoint import check_result, layer_config, list_sides, run_rounds
from tools.make_checkpoint import make_checkpoint


@pytest.fixture
def source(tmp_path: pathlib.Path) -> pathlib.Path:
    config = ModelConfig.preset("step3-tiny")
    text = dataclasses.replace(config.text, num_hidden_layers=1, moe_layers=(0,), moe_num_experts=4)
    make_checkpoint(tmp_path / "source", dataclasses.replace(config, text=text, vision=None, dtype="bfloat16"))
    return tmp_path / "source"


@pytest.mark.usefixtures("small_process")
def test_every_side_runs_cold_and_warm(
    source: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Rest is a matter of the whole machine: other tests write to its disk, and what this process holds is collected.
    rests: list[int] = []
    monkeypatch.setattr(bench_checkpoint, "settle", rests.append)
    scratch = source.parent / "scratch"
    scratch.mkdir()
    rows = run_rounds(source, scratch, list_sides(2, with_loading=True), 1)
    assert {(row["side"], row["cache"]) for row in rows} >= {("copy", "cold"), ("load_model", "warm")}
    assert len(rows) == 14
    # Five pairs of a side and its yardstick, cold and warm.
    assert rests == [sum(path.stat().st_size for path in source.iterdir())] * 20
    assert all(row["ratio"] == 1 for row in rows if row["side"] == row["yardstick"])
    # Both are rounded: on a busy machine the one is 0, on a fast one the other.
    assert all(row["gb_per_s"] > 0 or row["seconds"] > 0 for row in rows)
    assert not list(scratch.iterdir()), "results are removed"
    assert "GB/s" in capsys.readouterr().out


def test_the_machine_comes_to_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr("gc.collect", lambda: done.append("garbage"))
    monkeypatch.setattr("os.sync", lambda: done.append("disk"))
    bench_checkpoint.settle(10_000)
    assert done == ["garbage", "disk"]


def test_a_wrong_result_stops_the_benchmark(source: pathlib.Path) -> None:
    target = source.parent / "target"
    shutil.copytree(source, target)
    check_result(source, target)
    path = target / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="differs"):
        check_result(source, target)


def test_the_full_layer_is_the_released_width() -> None:
    config = layer_config(48)
    released = ModelConfig.preset("step3").text
    assert dataclasses.replace(
        config.text, num_hidden_layers=61, moe_layers=released.moe_layers, vocab_size=128815
    ) == (released)
    assert np.isclose(2 * count_parameters(config).total, 11.1e9, rtol=0.02)
