"""Linear maps: weights as stored, (out, in), plain or quantised."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels.fp8_matmul import fp8_matmul
from pallas_kernels.quantise import quantise_rows
from step3_jax.layers.linear import Linear, linear
from step3_jax.layers.rows import as_rows
from step3_jax.quant import dequantise, quantise


def test_weight_is_out_by_in_and_leading_axes_are_kept():
    rng = np.random.default_rng(0)
    hidden, weight = rng.normal(size=(2, 3, 4)).astype(np.float32), rng.normal(size=(5, 4)).astype(np.float32)
    np.testing.assert_allclose(linear(jnp.asarray(hidden), jnp.asarray(weight)), hidden @ weight.T, atol=1e-5)


def test_quantised_weight_gives_what_its_dequantised_form_gives():
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(3, 6)), jnp.float32)
    weight = quantise(jnp.asarray(rng.normal(size=(5, 6)), jnp.float32), block=(4, 4))
    np.testing.assert_array_equal(linear(hidden, weight), linear(hidden, dequantise(weight)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_activations_are_quantised_if_the_layer_is_told_so(dtype):
    rng = np.random.default_rng(0)
    layer = Linear(256, 128, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    hidden = jnp.asarray(rng.normal(size=(2, 3, 256)), dtype)
    layer.quantises = True
    assert not layer.takes_rows
    layer.weight.set_value(quantise(layer.weight.get_value()))
    assert layer.takes_rows
    found = layer(hidden)
    assert found.dtype == dtype
    assert found.shape == (2, 3, 128)
    weight = layer.weight.get_value()
    values, scales = quantise_rows(hidden.reshape(6, 256))
    expected = fp8_matmul(values, scales, weight.values, weight.scales, out_dtype=dtype)
    np.testing.assert_array_equal(found.reshape(6, 128).astype(jnp.float32), expected.astype(jnp.float32))
    np.testing.assert_array_equal(layer(as_rows(hidden)).astype(jnp.float32), expected.astype(jnp.float32))
    layer.quantises = False
    expected = linear(hidden, dequantise(weight, dtype))
    np.testing.assert_array_equal(layer(hidden).astype(jnp.float32), expected.astype(jnp.float32))


def test_sums_are_taken_in_float32():
    hidden = jnp.ones((1, 4096), jnp.bfloat16)
    assert float(linear(hidden, jnp.ones((1, 4096), jnp.bfloat16))[0, 0]) == 4096


@pytest.mark.parametrize("num_rows", [1, 3, 4])
def test_few_rows_in_bfloat16_equal_the_same_rows_among_many(num_rows):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(8, 64)), jnp.bfloat16)
    weight = jnp.asarray(rng.normal(size=(16, 64)), jnp.bfloat16)
    expected = hidden.astype(jnp.float32) @ weight.astype(jnp.float32).T
    found = linear(hidden[:num_rows], weight)
    assert found.shape == (num_rows, 16)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), expected[:num_rows], rtol=2**-8, atol=1e-4)


def test_rows_are_filled_up_by_the_platform_of_the_program_not_the_default_one(monkeypatch):
    """On a machine with GPUs a side of the model may be on CPUs, and programs for GPUs are compiled where there are none."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    traced = jax.jit(linear).trace(jnp.ones((1, 64), jnp.bfloat16), jnp.ones((16, 64), jnp.bfloat16))
    programs = {name: traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "cuda")}
    assert "stablehlo.pad" in programs["cpu"]
    assert "stablehlo.pad" not in programs["cuda"]
