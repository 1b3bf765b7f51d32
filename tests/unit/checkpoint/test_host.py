"""Weights on a CPU: kept as stored or quantised while they are read, in no more memory than the file's size."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from step3_jax.checkpoint import load, reader
from step3_jax.checkpoint.load import load_model
from step3_jax.checkpoint.memory import anonymous_bytes
from step3_jax.checkpoint.names import expected_tensors, is_fp8_tensor, parameters_of, released_name
from step3_jax.checkpoint.quantised import QuantisedParts
from step3_jax.checkpoint.safetensors_io import SafetensorsFile, write_safetensors
from step3_jax.config import ModelConfig, QuantConfig
from step3_jax.cpu_kernels.loader import Kernels, Unavailable
from step3_jax.quant import BlockScaled, PackedInt4, dequantise, quantise

OFF = Unavailable("STEP3_CPU_KERNELS is off", is_wanted=True)


@pytest.fixture
def with_kernels(monkeypatch, tmp_path):
    """As if the machine had the CPU kernels; nothing is computed here."""
    monkeypatch.setattr(load, "find_kernels", lambda: Kernels("plain", tmp_path))


@pytest.fixture
def without_kernels(monkeypatch):
    monkeypatch.setattr(load, "find_kernels", lambda: Unavailable("no C compiler was found"))


def stored_tensors(folder):
    with SafetensorsFile(folder / "model.safetensors") as file:
        return {name: np.array(file.read(name)) for name in file.tensors}


def test_fp8_and_bfloat16_stay_as_stored_beside_float32(goldens, with_kernels):
    stored = stored_tensors(goldens / "tiny_fp8")
    model = load_model(goldens / "tiny_fp8", "float32")
    assert model.text.dtype == jnp.float32
    assert model.config.quantization is not None
    kept = set()
    for path, parameter in parameters_of(model).items():
        value, name = parameter.get_value(), released_name(path)
        if isinstance(value, BlockScaled):
            assert np.asarray(value.values).tobytes() == stored[name].tobytes()
        else:
            kept.add(value.dtype.name)
            assert value.dtype == (
                jnp.bfloat16
                if value.ndim == 2 and "gate.weight" not in name and "embeddings" not in name
                else jnp.float32
            ), name
            np.testing.assert_array_equal(np.asarray(value, np.float32), stored[name].astype(np.float32))
    assert kept == {"bfloat16", "float32"}


def test_without_kernels_all_is_widened(goldens, without_kernels, caplog):
    model = load_model(goldens / "tiny_fp8", "float32")
    (record,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert "weights widened, without CPU kernels (no C compiler was found)" in record.getMessage()
    assert {parameter.get_value().dtype.name for parameter in parameters_of(model).values()} == {"float32"}
    assert model.config.quantization is None


@pytest.mark.parametrize(
    ("found", "quantization"),
    [(Kernels("plain", pathlib.Path()), "auto"), (OFF, "auto"), (Unavailable("no C compiler was found"), "none")],
)
def test_no_warning_where_kernels_run_or_are_not_wanted(goldens, monkeypatch, caplog, found, quantization):
    monkeypatch.setattr(load, "find_kernels", lambda: found)
    with caplog.at_level("INFO", "step3_jax"):
        load_model(goldens / "tiny_text", "float32", quantization=quantization)
    (record,) = (record for record in caplog.records if ": weights " in record.getMessage())
    assert record.levelname == "INFO"


# int8 is int4 without its packing.
@pytest.mark.parametrize("form", ["fp8", pytest.param("int8", marks=pytest.mark.slow), "int4"])
def test_a_plain_release_is_quantised_band_by_band(goldens, monkeypatch, with_kernels, form):
    monkeypatch.setattr(reader, "QUANTISED_BAND_BYTES", 2000)
    plain = parameters_of(load_model(goldens / "tiny_text", "float32", quantization="none"))
    model = load_model(goldens / "tiny_text", "float32", quantization=form)
    for path, parameter in parameters_of(model).items():
        value, right = parameter.get_value(), plain[path].get_value()
        if not is_fp8_tensor(released_name(path)):
            np.testing.assert_array_equal(value, right)
            continue
        right = quantise(right, form)
        assert type(value) is type(right)
        assert value.shape == right.shape
        for one, other in zip(jax.tree.leaves(value), jax.tree.leaves(right), strict=True):
            assert np.asarray(one).tobytes() == np.asarray(other).tobytes(), path


def test_an_fp8_release_becomes_integers(goldens, with_kernels):
    model = load_model(goldens / "tiny_fp8", "float32", quantization="int4")
    plain = load_model(goldens / "tiny_fp8", "float32", quantization="none")
    found, right = (one.text.layers[1].ffn.moe.gate_proj.get_value() for one in (model, plain))
    assert isinstance(found, PackedInt4)
    assert model.config.quantization is None
    # Fifteen steps from the smallest to the largest value of a group.
    assert np.abs(np.asarray(dequantise(found)) - right).max() <= np.abs(right).max() / 14 * 1.001


@pytest.mark.parametrize("quantization", ["stored", pytest.param("int8", marks=pytest.mark.slow)])
def test_values_that_are_no_number_are_refused(goldens, tmp_path, with_kernels, quantization):
    folder = shutil.copytree(goldens / "tiny_fp8", tmp_path / "model")
    tensors = stored_tensors(folder)
    name = "model.layers.1.moe.up_proj.weight"
    tensors[name].view(np.uint8)[2, 5, 7] = 0xFF
    write_safetensors(folder / "model.safetensors", tensors.items())
    with pytest.raises(ValueError, match=f"{name}.*(not numbers|cannot be quantised)"):
        load_model(folder, "float32", quantization=quantization)


@pytest.fixture(scope="module", params=["fp8", "bfloat16"])
def middling(request, tmp_path_factory):
    """About 25 MB of weights, most of them experts."""
    folder = tmp_path_factory.mktemp(request.param)
    config = ModelConfig.preset("step3-tiny")
    text = dataclasses.replace(
        config.text, hidden_size=512, intermediate_size=1024, num_hidden_layers=2, moe_layers=(1,), moe_num_experts=12,
        moe_intermediate_size=1024, share_expert_dim=512, share_q_dim=256, vocab_size=2048,
    )  # fmt: skip
    quantization = QuantConfig() if request.param == "fp8" else None
    config = dataclasses.replace(config, text=text, vision=None, dtype="bfloat16", quantization=quantization)
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in expected_tensors(config).items():
        array = rng.standard_normal(shape, np.float32)
        if request.param == "fp8" and is_fp8_tensor(name):
            made = quantise(jnp.asarray(array))
            tensors[name], tensors[f"{name}_scale_inv"] = np.asarray(made.values), np.asarray(made.scales)
        else:
            tensors[name] = array.astype(ml_dtypes.bfloat16)
    write_safetensors(folder / "model.safetensors", tensors.items())
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return folder, sum(array.nbytes for array in tensors.values())


def test_a_model_as_stored_takes_the_files_memory(middling, with_kernels):
    folder, stored = middling
    load_model(folder, "float32")  # what is compiled and imported once is not counted
    tracemalloc.start()
    try:
        before = anonymous_bytes()
        model = load_model(folder, "float32")
        held = sum(leaf.nbytes for one in parameters_of(model).values() for leaf in jax.tree.leaves(one.get_value()))
        taken, _ = tracemalloc.get_traced_memory()
        grown = anonymous_bytes() - before
    finally:
        tracemalloc.stop()
    assert held <= 1.05 * stored
    assert taken <= 1.05 * stored
    # The system's view: the threads' read buffers stay, and whole pages are counted.
    assert grown <= 1.05 * stored + 2**21 * load.NUM_READERS


def test_too_little_memory_is_said_with_the_form_and_both_sizes(goldens, monkeypatch, without_kernels):
    monkeypatch.setattr(load, "available_bytes", lambda: 1000)
    with pytest.raises(
        ValueError, match=r"take .*B of memory \(widened, without CPU kernels \(no C compiler.*1\.0 kB are left"
    ):
        load_model(goldens / "tiny_fp8", "float32")


@pytest.mark.parametrize("form", ["fp8", "int8", "int4"])
def test_what_is_quantised_here_is_not_copied_again(form):
    parts = QuantisedParts.empty(form, (3, 256, 256), (128, 128))
    parts.values[:], parts.scales[:] = np.zeros((), parts.values.dtype), 1
    for array, placed in zip((parts.values, parts.scales), jax.tree.leaves(parts.place(None)), strict=True):
        assert placed.unsafe_buffer_pointer() == array.ctypes.data
