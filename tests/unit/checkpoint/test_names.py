"""The table of names against the published sizes of the released model."""

from __future__ import annotations

import dataclasses
import math

import jax
import pytest
from flax import nnx

from step3_jax.checkpoint.names import (
    expected_scales,
    expected_tensors,
    is_fp8_tensor,
    our_path,
    parameters_of,
    released_name,
)
from step3_jax.config import ModelConfig
from step3_jax.layout.count import count_parameters
from step3_jax.model.step3 import Step3


@pytest.fixture(scope="module")
def config():
    return ModelConfig.preset("step3")


def test_the_released_model_has_as_many_tensors_as_its_index(config):
    assert len(expected_tensors(config)) == 1663


def test_sizes_of_the_fp8_release(config):
    scales = expected_scales(config)
    assert len(scales) == 656
    assert sum(math.prod(shape) for shape in scales.values()) == 19_191_136
    assert scales["model.layers.4.moe.gate_proj.weight_scale_inv"] == (48, 40, 56)
    assert scales["model.layers.4.moe.down_proj.weight_scale_inv"] == (48, 56, 40)
    shapes = expected_tensors(config)
    num_fp8 = sum(math.prod(shape) for name, shape in shapes.items() if is_fp8_tensor(name))
    assert num_fp8 == 314_427_572_224
    num_bytes = num_fp8 + 4 * 19_191_136 + 2 * (count_parameters(config).total - num_fp8)
    assert num_bytes == 327_589_017_984


def test_which_tensors_are_never_quantised():
    for name in ("model.layers.4.moe.gate.weight", "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
        assert not is_fp8_tensor(name)
    assert not is_fp8_tensor("vision_model.transformer.layers.0.mlp.fc1.weight")


def test_last_layer_is_dense_like_the_first_four(config):
    names = expected_tensors(config)
    dense = [layer for layer in range(61) if f"model.layers.{layer}.mlp.up_proj.weight" in names]
    assert dense == [0, 1, 2, 3, 60]
    assert not any(f"model.layers.{layer}.moe.gate.weight" in names for layer in dense)


def test_names_and_paths_are_each_others_inverse(config):
    for name in expected_tensors(config):
        assert released_name(our_path(name)) == name


@pytest.mark.parametrize("has_vision", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_table_and_modules_have_the_same_parameters(goldens, has_vision, has_bias):
    config = dataclasses.replace(ModelConfig.load(goldens / "tiny_vl"), projector_bias=has_bias)
    config = config if has_vision else dataclasses.replace(config, vision=None)
    model = nnx.eval_shape(lambda: Step3(config, rngs=nnx.Rngs(0)))
    shapes = {released_name(path): parameter.get_value().shape for path, parameter in parameters_of(model).items()}
    assert shapes == expected_tensors(config)


def test_setting_a_parameter_sets_it_in_the_model(goldens):
    config = dataclasses.replace(ModelConfig.load(goldens / "tiny_text"), vision=None)
    model = nnx.eval_shape(lambda: Step3(config, rngs=nnx.Rngs(0)))
    parameters_of(model)[our_path("model.norm.weight")].set_value(jax.numpy.full(64, 3.0))
    assert float(model.text.norm.weight[...][0]) == 3.0


@pytest.mark.parametrize(
    "name",
    ["", "model", "model.layers.0.norm.weight", "model.layers.01.moe.gate.weight", "model.layers..moe.gate.weight"],
)
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match="not a parameter of Step3"):
        our_path(name)
    with pytest.raises(ValueError, match="not a parameter of Step3"):
        released_name(tuple(name.split(".")))
