"""Saving: what is written is read back bit for bit, and nothing half-written is left."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest

from step3_jax.checkpoint import save
from step3_jax.checkpoint.load import load_model
from step3_jax.checkpoint.names import expected_scales, expected_tensors
from step3_jax.checkpoint.safetensors_io import LazyArray
from step3_jax.checkpoint.save import save_model
from step3_jax.checkpoint.shards import Checkpoint
from step3_jax.config import ModelConfig


def contents(folder):
    with Checkpoint(folder) as checkpoint:
        return {
            name: (info.dtype, info.shape, checkpoint.read(name).tobytes()) for name, info in checkpoint.tensors.items()
        }


@pytest.fixture(scope="module")
def text_model(goldens):
    return load_model(goldens / "tiny_text")


@pytest.mark.parametrize("name", ["tiny_text", "tiny_vl", "tiny_fp8"])
def test_round_trip_keeps_every_byte(goldens, tmp_path, name):
    save_model(load_model(goldens / name, quantization="stored"), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(goldens / name)


@pytest.mark.parametrize("name", ["tiny_vl", "tiny_fp8"])
def test_config_makes_the_round_trip(goldens, tmp_path, name):
    model = load_model(goldens / name, quantization="stored")
    save_model(model, tmp_path / "out")
    assert load_model(tmp_path / "out", quantization="stored").config == model.config
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert ("quantization_config" in values) == (name == "tiny_fp8")


def test_bfloat16_round_trip(text_model, tmp_path):
    save_model(text_model, tmp_path / "first", dtype="bfloat16")
    save_model(load_model(tmp_path / "first"), tmp_path / "second")
    first = contents(tmp_path / "first")
    assert {dtype for dtype, _, _ in first.values()} == {"BF16"}
    assert first == contents(tmp_path / "second")
    assert ModelConfig.load(tmp_path / "first").dtype == "bfloat16"


def test_quantised_save_has_the_fp8_layout_and_is_stable(text_model, tmp_path):
    save_model(text_model, tmp_path / "first", quantise_fp8=True)
    first = contents(tmp_path / "first")
    config = text_model.config
    assert {name: shape for name, (_, shape, _) in first.items()} == expected_tensors(config) | expected_scales(config)
    assert first["model.layers.1.moe.up_proj.weight"][0] == "F8_E4M3"
    assert first["model.layers.1.moe.gate.weight"][0] == "F32"
    kept = load_model(tmp_path / "first", quantization="stored")
    save_model(kept, tmp_path / "second")
    assert contents(tmp_path / "second") == first
    up, was = load_model(tmp_path / "first", quantization="none"), text_model
    found = np.asarray(up.text.layers[1].ffn.moe.up_proj[...])
    wanted = np.asarray(was.text.layers[1].ffn.moe.up_proj[...])
    assert np.abs(found - wanted).max() <= np.abs(wanted).max() / 16


@pytest.mark.parametrize("quantise_fp8", [False, True])
def test_weights_are_written_in_bands_and_are_the_same(text_model, tmp_path, monkeypatch, quantise_fp8):
    save_model(text_model, tmp_path / "whole", dtype="bfloat16", quantise_fp8=quantise_fp8)
    monkeypatch.setattr(save, "BAND_BYTES", 2000)
    sizes = []
    # One row of the widest matrix, or of blocks, takes more.
    widest = max(shape[-1] for shape in expected_tensors(text_model.config).values())
    written = LazyArray.__init__

    def init(self, shape, dtype, pieces):
        def watched():
            for piece in pieces():
                sizes.append(piece.nbytes)
                yield piece

        written(self, shape, dtype, watched)

    monkeypatch.setattr(LazyArray, "__init__", init)
    save_model(text_model, tmp_path / "bands", dtype="bfloat16", quantise_fp8=quantise_fp8)
    assert contents(tmp_path / "bands") == contents(tmp_path / "whole")
    assert max(sizes) <= (widest * 128 if quantise_fp8 else max(2000, 2 * widest))
    assert len(sizes) > 2 * len(contents(tmp_path / "bands"))


def test_shards_and_index(text_model, tmp_path):
    save_model(text_model, tmp_path / "one")
    save_model(text_model, tmp_path / "many", max_shard_bytes=200_000)
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 3
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


def test_target_must_be_empty(text_model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="not empty"):
            save_model(text_model, tmp_path, overwrite=overwrite)
    with pytest.raises(ValueError, match="is a file"):
        save_model(text_model, tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_overwriting_replaces_weights_and_keeps_other_files(text_model, tmp_path):
    folder = tmp_path / "out"
    save_model(text_model, folder, max_shard_bytes=200_000)
    (folder / "tokenizer.json").write_text("{}")
    save_model(text_model, folder, overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_save_leaves_nothing(text_model, tmp_path):
    with pytest.raises(ValueError, match="max_shard_bytes"):
        save_model(text_model, tmp_path / "out", max_shard_bytes=0)
    with pytest.raises(ValueError, match="allowed: float32, bfloat16"):
        save_model(text_model, tmp_path / "out", dtype=jnp.float16)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_forms_that_the_released_layout_lacks_are_refused_before_anything_is_written(goldens, tmp_path, form):
    model = load_model(goldens / "tiny_text", quantization=form)
    with pytest.raises(ValueError, match=f"is in {form.upper()}.*quantization stored, fp8 or none"):
        save_model(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
