"""Made checkpoints: the released layout, values that load, and bounded memory."""

from __future__ import annotations

import dataclasses
import pathlib
import tracemalloc

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from step3_jax.checkpoint.inspect import inspect_checkpoint
from step3_jax.checkpoint.load import load_model
from step3_jax.checkpoint.names import expected_tensors
from step3_jax.checkpoint.shards import INDEX_FILE, Checkpoint
from step3_jax.config import ModelConfig, QuantConfig
from tools.make_checkpoint import cut_layers, list_tensors, main, make_checkpoint


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    """Small, with partial FP8 blocks, one dense layer and one mixture."""
    config = ModelConfig.preset("step3-tiny")
    text = dataclasses.replace(config.text, num_hidden_layers=2, moe_layers=(1,), moe_num_experts=4)
    return dataclasses.replace(config, text=text, dtype="bfloat16")


@pytest.mark.parametrize(("preset", "num_bytes"), [("step3", 641_939_825_664), ("step3-fp8", 327_589_017_984)])
def test_full_size_takes_no_disk_and_fits(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], preset: str, num_bytes: int
) -> None:
    assert main([str(tmp_path / "model"), "--preset", preset, "--sparse"]) == 0
    assert f"{num_bytes:,} bytes of tensors (sparse)" in capsys.readouterr().out
    found = inspect_checkpoint(tmp_path / "model")
    assert not found.problems
    assert found.num_bytes == num_bytes
    assert sum(file.disk_bytes for file in found.files.values()) < 10**7
    assert (tmp_path / "model" / INDEX_FILE).exists()


@pytest.mark.parametrize("num_layers", [1, 5, 61, 70])
def test_any_number_of_layers_fits(tmp_path: pathlib.Path, num_layers: int) -> None:
    config = cut_layers(ModelConfig.preset("step3-fp8"), num_layers)
    make_checkpoint(tmp_path / "model", config, sparse=True)
    found = inspect_checkpoint(tmp_path / "model")
    assert not found.problems
    assert found.config is not None
    assert found.config.text.num_hidden_layers == num_layers
    assert len(found.config.text.moe_layers) == {1: 0, 5: 1, 61: 56, 70: 65}[num_layers]


@pytest.mark.parametrize("quantization", [None, QuantConfig()])
def test_values_load_and_give_finite_logits(
    tmp_path: pathlib.Path, config: ModelConfig, quantization: QuantConfig | None
) -> None:
    config = dataclasses.replace(config, quantization=quantization)
    total = make_checkpoint(tmp_path / "model", config, shard_bytes=10**6)
    assert total == inspect_checkpoint(tmp_path / "model").num_bytes
    with Checkpoint(tmp_path / "model") as checkpoint:
        for name, info in checkpoint.tensors.items():
            values = checkpoint.read(name).astype(np.float32)
            assert np.isfinite(values).all(), name
            assert np.ptp(values) > 0 or values.size < 4, f"{name} is constant"
            if info.dtype == "BF16" and len(info.shape) == 2 and values.size > 10_000:
                assert values.std() * info.shape[-1] ** 0.5 == pytest.approx(1, rel=0.05)
    model = load_model(tmp_path / "model", "float32", quantization="none")
    logits = model(jnp.array([[1, 2, 3]]))
    assert bool(jnp.isfinite(logits).all())


def test_values_follow_from_seed_and_name_and_not_from_shards(tmp_path: pathlib.Path, config: ModelConfig) -> None:
    for folder, seed, shard_bytes in (("a", 3, 10**9), ("b", 3, 10**5), ("c", 4, 10**9)):
        make_checkpoint(tmp_path / folder, config, seed=seed, shard_bytes=shard_bytes)
    with Checkpoint(tmp_path / "a") as a, Checkpoint(tmp_path / "b") as b, Checkpoint(tmp_path / "c") as c:
        assert list(a.tensors) == list(expected_tensors(config))
        for name in a.tensors:
            assert a.read(name).tobytes() == b.read(name).tobytes()
        assert a.read("lm_head.weight").tobytes() != c.read("lm_head.weight").tobytes()
        assert a.read("lm_head.weight").tobytes() != a.read("model.embed_tokens.weight").tobytes()


def test_memory_is_that_of_a_piece(tmp_path: pathlib.Path, config: ModelConfig) -> None:
    text = dataclasses.replace(config.text, vocab_size=200_000, num_hidden_layers=1, moe_layers=())
    tensors = dict(list_tensors(dataclasses.replace(config, text=text, vision=None), seed=0))
    table = tensors["model.embed_tokens.weight"]
    assert table.dtype == np.dtype(ml_dtypes.bfloat16)
    assert table.pieces is not None
    tracemalloc.start()
    try:
        sizes = [piece.nbytes for piece in table.pieces()]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(sizes) == 200_000 * config.text.hidden_size * 2
    assert peak < 50 * 2**20


def test_nothing_is_overwritten_and_nothing_is_left_behind(
    tmp_path: pathlib.Path, config: ModelConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "file").write_text("mine")
    with pytest.raises(ValueError, match="in the way"):
        make_checkpoint(tmp_path / "model", config)
    with pytest.raises(ValueError, match="max_shard_bytes is 0"):
        make_checkpoint(tmp_path / "other", config, shard_bytes=0)
    with pytest.raises(ValueError, match="seed is -1"):
        make_checkpoint(tmp_path / "other", config, seed=-1)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert main([str(tmp_path / "model")]) == 2
    assert "in the way" in capsys.readouterr().err


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"are free: give fewer layers, or --sparse"):
        make_checkpoint(tmp_path / "model", cut_layers(ModelConfig.preset("step3"), 1000))
    assert not list(tmp_path.iterdir())


def test_the_first_layers_may_be_dense_and_the_others_mixtures() -> None:
    config = cut_layers(ModelConfig.preset("step3-fp8"), 3, 1)
    assert config.text.moe_layers == (1, 2)
    with pytest.raises(ValueError, match="4 of 3 layers cannot be dense"):
        cut_layers(config, 3, 4)
