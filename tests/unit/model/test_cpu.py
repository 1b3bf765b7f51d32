"""Models as CPUs run them: stored weights with the CPU kernels, widened ones without."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from step3_jax.checkpoint.names import is_fp8_tensor, parameters_of, released_name
from step3_jax.config import ModelConfig
from step3_jax.cpu_kernels.loader import Kernels, Unavailable, find_kernels
from step3_jax.model import cpu
from step3_jax.model.cpu import copy_module, prepare_for_cpu
from step3_jax.model.fuse import set_quantised
from step3_jax.model.step3 import Step3
from step3_jax.quant import BlockScaled, dequantise, quantise
from tests.small import small_text

IDS = jnp.asarray([[3, 5, 7, 11, 13, 17, 19, 23, 29]])


def kernels():
    found = find_kernels()
    if not isinstance(found, Kernels):
        pytest.skip(found.reason)
    return found


def held_in(form):
    """A separate model, see `make_model`."""
    return copy_module(make_model(form))


@functools.cache
def make_model(form):
    """A small model in bfloat16 whose matrices of the layers are quantised."""
    config = ModelConfig(text=small_text(), vision=None, dtype="bfloat16", image_token_id=1, eos_token_id=0)
    model = Step3(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    for path, weight in parameters_of(model).items():
        if form != "bfloat16" and is_fp8_tensor(released_name(path)):
            weight.set_value(quantise(weight.get_value(), form))
    return model


def run(model):
    graphdef, state = nnx.split(model)
    return np.asarray(jax.jit(lambda state, ids: nnx.merge(graphdef, state)(ids))(state, IDS))


# A model is compiled twice for each form. FP8 is compared with golden numbers in tests/parity.
@pytest.mark.slow
@pytest.mark.parametrize("form", ["bfloat16", "fp8", "int8", "int4"])
def test_stored_weights_give_what_widened_ones_give(form):
    model = held_in(form)
    stored = prepare_for_cpu(model, kernels())
    expected = run(prepare_for_cpu(model, None))
    np.testing.assert_allclose(run(stored), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_matrices_stay_as_stored_and_the_rest_is_widened():
    model = held_in("fp8")
    prepared = prepare_for_cpu(model, kernels())
    layer = prepared.text.layers[1]
    kept, given = (part.text.layers[1].ffn.moe.down_proj.get_value() for part in (prepared, model))
    assert kept.values is given.values
    assert isinstance(layer.attention.self_attn.wq.weight.get_value(), BlockScaled)
    assert layer.attention.self_attn.cpu_kernels == kernels()
    assert prepared.text.embed_tokens.weight.get_value().dtype == jnp.bfloat16
    assert layer.attention.input_layernorm.weight.get_value().dtype == jnp.float32
    # The given model is unchanged.
    assert model.text.layers[1].attention.input_layernorm.weight.get_value().dtype == jnp.bfloat16
    assert model.text.lm_head.cpu_kernels is None


def test_what_the_kernels_do_not_take_is_widened():
    model = held_in("bfloat16")
    head = model.text.lm_head.weight
    head.set_value(quantise(head.get_value(), block=(16, 16)))
    prepared = prepare_for_cpu(model, kernels())
    np.testing.assert_array_equal(prepared.text.lm_head.weight.get_value(), dequantise(head.get_value()))
    assert prepared.text.lm_head.cpu_kernels is None
    assert prepared.text.layers[0].ffn.mlp.cpu_kernels is not None


def test_without_kernels_all_is_float32():
    prepared = prepare_for_cpu(held_in("fp8"), None)
    leaves = jax.tree.leaves(nnx.state(prepared, nnx.Param))
    assert prepared.text.layers[0].attention.self_attn.cpu_kernels is None
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("form", ["bfloat16", "fp8", "int8", "int4"])
def test_rows_of_a_stored_embedding_are_looked_up_and_widened(form):
    model = held_in("bfloat16")
    table = model.text.embed_tokens.weight
    if form != "bfloat16":
        table.set_value(quantise(table.get_value(), form))
    plain = table.get_value().astype(jnp.float32) if form == "bfloat16" else dequantise(table.get_value())
    found = prepare_for_cpu(model, kernels()).text.embed_tokens(IDS)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, plain[IDS])


@pytest.mark.parametrize(
    ("instruction_set", "asked", "quantization", "is_apart", "expected"),
    [
        ("avx512_bf16", "bfloat16", "auto", False, "bfloat16"),
        ("avx512_bf16", None, "auto", False, "float32"),
        ("avx512_bf16", "float32", "auto", False, "float32"),
        ("avx512_bf16", "bfloat16", "none", False, "float32"),
        ("avx512_bf16", "bfloat16", "auto", True, "float32"),
        ("avx512", "bfloat16", "fp8", False, "float32"),
        (None, "bfloat16", "auto", False, "float32"),
    ],
)
def test_a_model_is_loaded_in_what_it_runs_in(
    monkeypatch, caplog, tmp_path, instruction_set, asked, quantization, is_apart, expected
):
    found = Kernels(instruction_set, tmp_path) if instruction_set else Unavailable("no C compiler was found")
    monkeypatch.setattr(cpu, "find_kernels", lambda: found)
    assert cpu.choose_dtype(asked, quantization, is_apart=is_apart) == expected
    # Commands show warnings: an option without effect is said.
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == (asked == "bfloat16" and expected == "float32")
    assert all(text.startswith("activations are float32, not bfloat16 (leave out") for text in warnings)


# A model is compiled twice.
@pytest.mark.slow
@pytest.mark.parametrize("form", ["bfloat16", "fp8"])
def test_products_in_bfloat16_give_nearly_what_float32_gives(form):
    rounding = kernels().for_activations("bfloat16")
    if rounding.activations != "bfloat16":
        pytest.skip("this processor has no products of bfloat16")
    model = held_in(form)
    found, expected = run(prepare_for_cpu(model, rounding)), run(prepare_for_cpu(model, kernels()))
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert 1e-5 < error < 0.05


@pytest.mark.parametrize("has_kernels", [True, False])
def test_products_of_quantised_activations_keep_their_weights_and_take_no_kernels(has_kernels):
    model = held_in("fp8")
    set_quantised(model, wanted=True)
    prepared = prepare_for_cpu(model, kernels() if has_kernels else None)
    ffn, attention = prepared.text.layers[1].ffn, prepared.text.layers[1].attention.self_attn
    for module in (ffn.moe, ffn.share_expert, attention.wq):
        assert module.takes_rows
        assert module.cpu_kernels is None
    assert np.isfinite(run(prepared)).all()
