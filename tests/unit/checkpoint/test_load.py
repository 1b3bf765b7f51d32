"""Loading: everything wrong is reported at once, and what is loaded is what was stored."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from step3_jax.checkpoint import load
from step3_jax.checkpoint.form_choice import Place
from step3_jax.checkpoint.load import load_model
from step3_jax.checkpoint.memory import anonymous_bytes
from step3_jax.checkpoint.names import expected_tensors, parameters_of, released_name
from step3_jax.checkpoint.safetensors_io import SafetensorsFile, write_safetensors
from step3_jax.config import ModelConfig
from step3_jax.model.arrangement import Arrangement
from step3_jax.model.step3 import abstract_step3
from step3_jax.quant import BlockScaled, dequantise


@pytest.fixture
def copy(goldens, tmp_path):
    """Copies a golden model, changes its tensors, and returns the folder."""

    def make(name, change=None, folder_name=None):
        folder = tmp_path / (folder_name or name)
        shutil.copytree(goldens / name, folder)
        if change is not None:
            with SafetensorsFile(folder / "model.safetensors") as file:
                tensors = {key: np.array(file.read(key)) for key in file.tensors}
            change(tensors)
            write_safetensors(folder / "model.safetensors", tensors.items())
        return folder

    return make


def check_error(folder, *parts):
    with pytest.raises(ValueError, match=r"does not match its config\.json") as error:
        load_model(folder)
    for part in parts:
        assert part in str(error.value)


def test_every_problem_is_reported_at_once(copy):
    def change(tensors):
        del tensors["model.norm.weight"], tensors["model.layers.1.moe.up_proj.weight"]
        tensors["model.layers.9.extra.weight"] = np.zeros(1, np.float32)
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:, :-1]
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].astype(np.int32)

    check_error(
        copy("tiny_text", change),
        "2 tensors missing: model.layers.1.moe.up_proj.weight, model.norm.weight",
        "model.layers.9.extra.weight",
        "lm_head.weight is [192, 63], [192, 64] needed",
        "model.embed_tokens.weight is I32",
    )


def test_stacks_of_experts_that_disagree_are_refused_before_anything_is_read(copy, monkeypatch):
    def change(tensors):
        moe = "model.layers.1.moe."
        tensors[f"{moe}up_proj.weight"] = tensors[f"{moe}up_proj.weight"][:-1]
        tensors[f"{moe}down_proj.weight_scale_inv"] = tensors[f"{moe}down_proj.weight_scale_inv"][:-1]
        tensors[f"{moe}gate_proj.weight_scale_inv"] = tensors[f"{moe}gate_proj.weight_scale_inv"].repeat(2, axis=1)

    monkeypatch.setattr(load, "_fill", lambda *_, **__: pytest.fail("it is read"))
    check_error(
        copy("tiny_fp8", change),
        "3 tensors of the wrong shape",
        "moe.up_proj.weight is [",
        "moe.down_proj.weight_scale_inv is [",
        "moe.gate_proj.weight_scale_inv is [",
    )


def test_no_vision_tensor_gives_a_text_only_model(goldens):
    model = load_model(goldens / "tiny_text")
    assert model.config.vision is None
    assert model.vision is None
    assert model.projector is None


def test_half_a_tower_is_an_error(copy):
    def change(tensors):
        for name in [name for name in tensors if name.startswith("vit_")]:
            del tensors[name]

    check_error(copy("tiny_vl", change), "5 tensors missing", "vit_large_projector.weight")


def test_long_lists_are_cut(copy):
    def change(tensors):
        tensors |= {f"extra.{number}": np.zeros(1, np.float32) for number in range(30)}

    check_error(copy("tiny_text", change), "30 tensors it should not have", "... and 10 more")


def test_buffers_of_old_tools_are_ignored(copy):
    def change(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
        tensors["model.rotary_emb.cos_cached"] = np.zeros(4, np.float16)
        tensors["vision_model.embeddings.position_ids"] = np.arange(5, dtype=np.int64)[None]

    load_model(copy("tiny_text", change))


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.uint64, np.int8, np.bool_, np.float64, np.complex64])
def test_a_further_tensor_of_any_dtype_is_just_that(copy, dtype):
    def change(tensors):
        tensors["further"] = np.zeros(3, dtype)

    with pytest.raises(ValueError, match=r"1 tensors it should not have .*: further$"):
        load_model(copy("tiny_text", change))


def _with_scales(dtype):
    def change(tensors):
        for name in tensors:
            if name.endswith("_scale_inv"):
                # Powers of two, which every dtype represents.
                tensors[name] = (2.0 ** np.round(np.log2(tensors[name]))).astype(dtype)

    return change


@pytest.mark.parametrize("quantization", ["stored", "none"])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64, ml_dtypes.float8_e8m0fnu])
def test_scales_of_any_dtype_become_float32(copy, quantization, dtype):
    first, second = copy("tiny_fp8", _with_scales(np.float32)), copy("tiny_fp8", _with_scales(dtype), "other")
    mesh = Mesh(np.array(jax.devices()[:1]), ("model",))
    wanted = parameters_of(load_model(first, "float32", quantization=quantization))
    shardings = {path: NamedSharding(mesh, PartitionSpec()) for path in wanted}
    for where in (None, shardings):
        found = parameters_of(load_model(second, "float32", quantization=quantization, shardings=where))
        for path, parameter in found.items():
            for one, other in zip(
                jax.tree.leaves(parameter.get_value()), jax.tree.leaves(wanted[path].get_value()), strict=True
            ):
                assert one.dtype == other.dtype
                assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_float16_weights_load_by_default_and_in_the_wanted_dtype(copy):
    def change(tensors):
        for name, array in tensors.items():
            tensors[name] = array.astype(np.float16)

    folder = copy("tiny_text", change)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"torch_dtype": "float16"}))
    with SafetensorsFile(folder / "model.safetensors") as file:
        stored = np.array(file.read("model.norm.weight"))
    for dtype, name in ((None, "bfloat16"), ("float32", "float32")):
        model = load_model(folder, dtype)
        norm = np.asarray(parameters_of(model)["text", "norm", "weight"][...])
        assert (model.config.dtype, norm.dtype) == (name, jnp.dtype(name))
        np.testing.assert_array_equal(norm, stored.astype(jnp.dtype(name)))


def test_a_checkpoint_that_memory_cannot_hold_is_refused_with_the_sizes(goldens, monkeypatch):
    monkeypatch.setattr(load, "available_bytes", lambda: 1000)
    with pytest.raises(
        ValueError,
        match=r"weights take .* [kM]B of memory \(widened, as asked for\), but 1\.0 kB are left.*quantization",
    ):
        load_model(goldens / "tiny_text", "float32", quantization="none")
    mesh = Mesh(np.array(jax.devices()[:1]), ("model",))
    shardings = {
        path: NamedSharding(mesh, PartitionSpec("model"))
        for path in parameters_of(abstract_step3(ModelConfig.load(goldens / "tiny_text")))
    }
    with pytest.raises(ValueError, match="are left here"):
        load_model(goldens / "tiny_text", shardings=shardings)
    monkeypatch.setattr(load, "available_bytes", lambda: None)
    load_model(goldens / "tiny_text")


def test_scales_belong_to_fp8_tensors(copy):
    name = "model.layers.0.self_attn.wq.weight"

    def change(tensors):
        tensors[name] = tensors[name].astype(np.float32).astype(ml_dtypes.bfloat16)
        del tensors["model.layers.0.mlp.up_proj.weight_scale_inv"]
        shape = tensors["model.layers.1.moe.gate_proj.weight_scale_inv"].shape
        tensors["model.layers.1.moe.gate_proj.weight_scale_inv"] = np.ones(shape[:-1], np.float32)
        scale = "model.layers.1.moe.up_proj.weight_scale_inv"
        tensors[scale] = tensors[scale].astype(np.int32)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(ml_dtypes.float8_e4m3fn)

    check_error(
        copy("tiny_fp8", change),
        f"it should not have (only FP8 tensors have scales): {name}_scale_inv",
        "missing: model.layers.0.mlp.up_proj.weight_scale_inv",
        "gate_proj.weight_scale_inv is [4, 2], [4, 2, 2] needed",
        "up_proj.weight_scale_inv is I32, BF16 or F32 or F16 or F64 or F8_E8M0 needed",
        "lm_head.weight is F8_E4M3",
    )


def test_dtype_goes_by_the_tensor_and_not_by_a_rule(copy):
    name = "model.layers.0.self_attn.wq.weight"

    def change(tensors):
        tensors[name] = tensors[name].astype(np.float32).astype(ml_dtypes.bfloat16)
        del tensors[f"{name}_scale_inv"]

    model = load_model(copy("tiny_fp8", change), quantization="stored")
    attention = model.text.layers[0].attention.self_attn
    assert isinstance(attention.q_proj.weight.get_value(), BlockScaled)
    assert attention.wq.weight.get_value().dtype == jnp.bfloat16


def test_fp8_needs_a_quantization_config(copy):
    folder = copy("tiny_fp8")
    values = json.loads((folder / "config.json").read_text())
    del values["quantization_config"]
    (folder / "config.json").write_text(json.dumps(values))
    check_error(folder, "no quantization_config")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", jnp.bfloat16])
def test_every_parameter_has_the_wanted_dtype(goldens, dtype):
    model = load_model(goldens / "tiny_fp8", dtype, quantization="none")
    assert {parameter.get_value().dtype for parameter in parameters_of(model).values()} == {jnp.dtype(dtype)}
    assert model.config.dtype == jnp.dtype(dtype).name
    assert model.config.quantization is None


def test_default_dtype_is_the_configurations(goldens):
    assert load_model(goldens / "tiny_fp8").text.norm.weight[...].dtype == jnp.bfloat16
    assert load_model(goldens / "tiny_text").text.norm.weight[...].dtype == jnp.float32


@pytest.mark.parametrize("dtype", ["float16", "int8", "no dtype"])
def test_other_dtypes_are_refused(goldens, dtype):
    with pytest.raises(ValueError, match="allowed: float32, bfloat16"):
        load_model(goldens / "tiny_text", dtype)


def test_kept_fp8_is_stored_bits_and_dequantises_alike(goldens):
    kept = parameters_of(load_model(goldens / "tiny_fp8", quantization="stored"))
    plain = parameters_of(load_model(goldens / "tiny_fp8", quantization="none"))
    with SafetensorsFile(goldens / "tiny_fp8" / "model.safetensors") as file:
        num_fp8 = 0
        for path, parameter in kept.items():
            value, name = parameter.get_value(), released_name(path)
            if isinstance(value, BlockScaled):
                num_fp8 += 1
                assert np.asarray(value.values).tobytes() == file.read(name).tobytes()
                np.testing.assert_array_equal(value.scales, file.read(f"{name}_scale_inv"))
                value = dequantise(value, jnp.bfloat16)
            np.testing.assert_array_equal(np.asarray(value), np.asarray(plain[path].get_value()), err_msg=name)
    assert num_fp8 == 30


def test_weights_do_not_change_with_the_file(copy):
    folder = copy("tiny_text")
    model = load_model(folder)
    before = np.array(model.text.embed_tokens.weight[...])
    path = folder / "model.safetensors"
    with path.open("r+b") as file:
        file.seek(100_000)
        file.write(bytes(path.stat().st_size - 100_000))
    np.testing.assert_array_equal(model.text.embed_tokens.weight[...], before)


@pytest.mark.parametrize("quantization", ["stored", "none"])
def test_shardings_place_the_same_values(goldens, quantization):
    whole = parameters_of(load_model(goldens / "tiny_fp8", quantization=quantization))
    mesh = Mesh(np.array(jax.devices()[:1]), ("model",))
    shardings = {path: NamedSharding(mesh, PartitionSpec("model")) for path in whole}
    placed = parameters_of(load_model(goldens / "tiny_fp8", quantization=quantization, shardings=shardings))
    for path, parameter in placed.items():
        for found, wanted in zip(
            jax.tree.leaves(parameter.get_value()), jax.tree.leaves(whole[path].get_value()), strict=True
        ):
            assert found.sharding.is_equivalent_to(shardings[path], found.ndim)
            np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))


@pytest.fixture
def stacks(goldens, tmp_path):
    """A model that is three stacks of experts and little else; its folder, and the bytes of a stack and of the model."""
    config = ModelConfig.load(goldens / "tiny_text")
    text = dataclasses.replace(config.text, moe_num_experts=256, moe_intermediate_size=256, moe_layers=(1,))
    config = dataclasses.replace(config, text=text, vision=None)
    rng = np.random.default_rng(0)
    tensors = {name: rng.random(shape, np.float32) for name, shape in expected_tensors(config).items()}
    sizes = [tensor.nbytes for tensor in tensors.values()]
    assert sorted(sizes)[-3:] == [256 * 256 * 64 * 4] * 3
    write_safetensors(tmp_path / "model.safetensors", tensors.items())
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    return tmp_path, max(sizes), sum(sizes)


def peak_of_host_memory(folder, dtype=None, arrangement=None):
    """Bytes of numpy's arrays and Python's objects (what JAX takes for itself is not counted), and the model."""
    load_model(folder, dtype, arrangement=arrangement)  # what is compiled and imported once is not counted
    tracemalloc.start()
    try:
        model = load_model(folder, dtype, arrangement=arrangement)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return peak, model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_on_the_cpu_takes_the_memory_of_its_weights_once(stacks, dtype):
    folder, _, total = stacks
    total = total * jnp.dtype(dtype).itemsize // 4
    peak, model = peak_of_host_memory(folder, dtype)
    # In addition there are the buffers in which threads cast.
    assert peak < total + 2**21 * load.NUM_READERS
    del model
    before = anonymous_bytes()
    model = load_model(folder, dtype)
    # JAX has taken the arrays without a copy.
    assert anonymous_bytes() - before < 1.3 * total
    assert model.config.dtype == dtype


def test_host_memory_never_holds_a_stack_that_goes_to_an_accelerator(stacks, monkeypatch):
    folder, stack, _ = stacks
    whole = parameters_of(load_model(folder))
    monkeypatch.setattr(load, "_place_of", lambda sharding: Place("gpu", 1))
    peak, model = peak_of_host_memory(folder, arrangement=Arrangement())
    assert peak < stack / 2
    for path, parameter in parameters_of(model).items():
        np.testing.assert_array_equal(parameter.get_value(), whole[path].get_value())


def test_shardings_must_name_every_parameter(goldens):
    with pytest.raises(ValueError, match="shardings lacks"):
        load_model(goldens / "tiny_text", shardings={})


def test_hub_names_missing_folders_and_files(tmp_path, goldens):
    for path, message in (
        ("stepfun-ai/step3", "hf download stepfun-ai/step3"),
        ("models/none", "there is no folder models/none; give"),
        (tmp_path / "none", "there is no folder"),
        (tmp_path, "has no config.json"),
        (goldens / "tiny_text" / "config.json", "is a file"),
    ):
        with pytest.raises(ValueError, match=message):
            load_model(path)


def test_progress_shows_bytes(goldens, capsys):
    load_model(goldens / "tiny_text", progress=True)
    assert "B/s" in capsys.readouterr().err
