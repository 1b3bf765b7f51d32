"""Layers are loaded straight into stacks, in every form that loading has, and saved out of them."""

from __future__ import annotations

import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

from step3_jax.checkpoint.load import load_model
from step3_jax.checkpoint.names import parameters_of
from step3_jax.checkpoint.save import save_model
from step3_jax.config import ModelConfig
from step3_jax.layout.parallel import Parallel
from step3_jax.mesh import Layout, make_layout
from step3_jax.model.arrangement import Arrangement, unstack
from step3_jax.model.step3 import Step3
from step3_jax.stack import pick
from tests.small import small_text

TEXT = small_text(num_hidden_layers=4, moe_layers=(1, 2), hidden_size=128, intermediate_size=128)
CONFIG = ModelConfig(text=TEXT, vision=None, dtype="float32", image_token_id=1, eos_token_id=0)
ALL = Arrangement(stacks=True, fuses=True, quantises=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A model with weights in FP8 and others next to them."""
    path = tmp_path_factory.mktemp("model") / "saved"
    save_model(Step3(CONFIG, rngs=nnx.Rngs(0)), path, quantise_fp8=True)
    return path


def one_device() -> Layout:
    """Makes loading treat a CPU like other devices."""
    return make_layout(Parallel(ep=1), jax.devices()[:1])


def check_equal(found: Step3, expected: Step3) -> None:
    values, wanted = parameters_of(found), parameters_of(expected)
    assert values.keys() == wanted.keys()
    for path, variable in wanted.items():
        found_leaves = jax.tree.leaves(pick(values[path].get_value()))
        pairs = zip(found_leaves, jax.tree.leaves(variable.get_value()), strict=True)
        for one, other in pairs:
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other), err_msg=str(path))


def test_stacks_hold_what_the_layers_are(folder: pathlib.Path) -> None:
    apart = load_model(folder, quantization="stored")
    for layout in (None, one_device()):
        stacked = load_model(folder, quantization="stored", layout=layout, arrangement=ALL)
        assert [part.count for part in stacked.text.layers] == [1, 2, 1]
        check_equal(unstack(stacked), apart)


def test_a_stacked_model_is_saved_as_its_layers(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    save_model(load_model(folder, quantization="stored", arrangement=ALL), tmp_path / "again")
    check_equal(load_model(tmp_path / "again", quantization="stored"), load_model(folder, quantization="stored"))
