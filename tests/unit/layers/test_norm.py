"""Normalisation: plain weights, statistics in float32."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from step3_jax.layers.norm import LayerNorm, rms_norm


def test_rms_norm_multiplies_by_the_plain_weight():
    hidden = np.array([[3.0, 4.0]], np.float32)
    found = rms_norm(jnp.asarray(hidden), jnp.asarray([2.0, 0.0]), eps=1e-5)
    np.testing.assert_allclose(found, [[3.0 / np.sqrt(12.5 + 1e-5) * 2, 0.0]], rtol=1e-6)


def test_rms_norm_casts_back_before_the_weight():
    hidden = jnp.asarray([[1.0, 2.0, 3.0, 5.0]], jnp.bfloat16)
    weight = jnp.asarray([1.1, 0.9, 1.3, 0.7], jnp.bfloat16)
    wide = np.asarray(hidden).astype(np.float32)
    normed = jnp.asarray(wide / np.sqrt((wide**2).mean() + 1e-5)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(rms_norm(hidden, weight, eps=1e-5)), np.asarray(normed * weight))


def test_rms_norm_does_not_overflow_in_bfloat16():
    hidden = jnp.full((1, 4), 1e30, jnp.bfloat16)
    assert np.isfinite(
        np.asarray(rms_norm(hidden * 1e-15, jnp.ones(4, jnp.bfloat16), eps=1e-5)).astype(np.float32)
    ).all()


def test_layer_norm_has_weight_and_bias():
    layer = LayerNorm(3, eps=1e-6)
    layer.weight.set_value(jnp.asarray([1.0, 2.0, 3.0]))
    layer.bias.set_value(jnp.asarray([0.5, 0.0, -0.5]))
    found = layer(jnp.asarray([[1.0, 2.0, 6.0]]))
    hidden = np.array([1.0, 2.0, 6.0])
    expected = (hidden - 3) / np.sqrt(hidden.var() + 1e-6) * [1, 2, 3] + [0.5, 0, -0.5]
    np.testing.assert_allclose(found[0], expected, rtol=1e-5)
