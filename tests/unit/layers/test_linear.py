"""Linear maps: weights as stored, (out, in), plain or quantised."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from step3_jax.layers.linear import linear
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
