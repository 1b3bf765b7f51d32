"""`step3 inspect`."""

from __future__ import annotations

import json
import pathlib
import shutil

import pytest

from step3_jax.cli.main import main
from step3_jax.config import ModelConfig
from step3_jax.layout.count import count_parameters


def test_text_says_what_there_is(goldens: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = goldens / "tiny_fp8"
    assert main(["inspect", str(folder)]) == 0
    text = capsys.readouterr().out
    assert f"{count_parameters(ModelConfig.load(folder)).text:,}" in text
    assert "30 of the 30 tensors that the release quantises" in text
    assert "all fits the configuration" in text


def test_tensors_are_listed_on_request(goldens: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(goldens / "tiny_text"), "--tensors"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("model.safetensors")
    assert ["model.embed_tokens.weight", "F32", "192", "x", "64", "49,152"] in [line.split() for line in lines]


def test_json_is_one_object(goldens: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(goldens / "tiny_vl"), "--json", "--tensors"]) == 0
    found = json.loads(capsys.readouterr().out)
    config = ModelConfig.from_dict(found["config"])
    assert found["fits"] is True
    assert found["parameters"]["total"] == count_parameters(config).total
    assert sum(tensor["bytes"] for tensor in found["tensors"].values()) == found["num_bytes"]
    assert found["files"]["model.safetensors"]["tensors"] == found["num_tensors"]


def test_what_does_not_fit_is_exit_code_1(
    goldens: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(goldens / "tiny_text" / "model.safetensors", tmp_path)
    shutil.copy(goldens / "tiny_vl" / "config.json", tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["text_config"]["vocab_size"] += 1
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert main(["inspect", str(tmp_path)]) == 1
    text = capsys.readouterr().out
    assert "does NOT fit" in text
    assert "lm_head.weight is [192, 64], [193, 64] needed" in text
    assert main(["inspect", str(tmp_path), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is False
    assert len(found["problems"]["tensors of the wrong shape"]) == 2


def test_nothing_there_is_exit_code_2(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "none")]) == 2
    assert "there is nothing at" in capsys.readouterr().err
