"""Bytes of each form, and what a deployment counts with them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from step3_jax.config import ModelConfig
from step3_jax.layout.count import weight_bytes
from step3_jax.layout.deployment import load_deployment
from step3_jax.layout.role import deployed_config, roles_of
from step3_jax.layout.weight_form import form_bytes
from step3_jax.quant import quantise


@pytest.mark.parametrize("form", ["fp8", "int8", "int4"])
@pytest.mark.parametrize("shape", [(3, 5), (130, 300), (2, 256, 129)])
def test_bytes_are_those_of_the_quantised_array(form: str, shape: tuple[int, ...]) -> None:
    made = quantise(jnp.ones(shape), form)  # type: ignore[arg-type]
    assert form_bytes(shape, form) == sum(leaf.nbytes for leaf in jax.tree.leaves(made))


def test_plain_forms_have_no_scales() -> None:
    assert (form_bytes((3, 5), "float32"), form_bytes((7,), "bfloat16"), form_bytes((), "float32")) == (60, 14, 4)


@pytest.mark.parametrize(("weights", "gib"), [("fp8", 305.1), ("int8", 314.2), ("int4", 167.7)])
def test_the_whole_model_on_one_server(weights: str, gib: float) -> None:
    deployment = dataclasses.replace(load_deployment("cpu-384gb"), weights=weights)
    config = deployed_config(ModelConfig.preset("step3"), weights)
    parts = weight_bytes(config, weights, roles_of(deployment)[0])
    assert sum(parts.values()) / 2**30 == pytest.approx(gib, abs=0.1)
