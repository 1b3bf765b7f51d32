"""Timing a checkpoint layer by layer: what is counted, and what is predicted from it."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import pytest

from step3_jax.config import ModelConfig, QuantConfig
from tools.make_checkpoint import make_checkpoint
from tools.time_layers import Timing, main, predict_s


def test_a_prediction_is_the_sum_of_as_many_layers_of_each_kind() -> None:
    timings = [
        Timing("attention 0", 1.0, 10),
        Timing("dense 0", 5.0, 10),
        Timing("attention 1", 3.0, 10),
        Timing("experts 1", 7.0, 10),
        Timing("head", 11.0, 10),
    ]
    assert predict_s(timings, 61, 56) == pytest.approx((61 * 2 + 5 * 5 + 56 * 7 + 11) / 1000)
    assert predict_s(timings[:2], 61, 56) is None


@pytest.mark.slow  # It compiles each half of each layer, and an engine.
def test_a_small_checkpoint_loads_answers_and_is_timed(tmp_path: pathlib.Path) -> None:
    config = ModelConfig.preset("step3-tiny")
    text = dataclasses.replace(config.text, num_hidden_layers=2, moe_layers=(1,), moe_num_experts=4)
    config = dataclasses.replace(config, text=text, vision=None, dtype="bfloat16", quantization=QuantConfig())
    size = make_checkpoint(tmp_path / "model", config)
    assert main([str(tmp_path / "model"), "--repeats", "2", "--tokens", "3", "--json", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["stored_bytes"] == size
    assert [one["name"] for one in found["layers"]] == ["attention 0", "dense 0", "attention 1", "experts 1", "head"]
    assert len(found["answer"]) == 3
    # The experts that a token chooses, and the shared one.
    experts = found["layers"][3]["read_bytes"]
    shared, routed = text.share_expert_dim, text.moe_intermediate_size * text.moe_top_k
    assert experts == pytest.approx(3 * text.hidden_size * (shared + routed), rel=0.02)
