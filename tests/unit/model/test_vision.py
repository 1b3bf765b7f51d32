"""Position tables of other grids: bicubic with antialias, a = -0.5, against a plain numpy resize."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from step3_jax.model.vision import resize_positions


def cubic(x):
    """Keys' kernel with a = -0.5."""
    x = np.abs(x)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def matrix(from_size, to_size):
    """Weights of each old row for each new one; the kernel is widened, and cut and normalised at the borders."""
    scale = from_size / to_size
    centres = (np.arange(to_size)[:, None] + 0.5) * scale
    weights = cubic((np.arange(from_size)[None] + 0.5 - centres) / scale)
    return weights / weights.sum(1, keepdims=True)


def test_smaller_grid_is_bicubic_with_antialias():
    table = np.random.default_rng(0).normal(size=(1 + 64, 3)).astype(np.float32)
    found = np.asarray(resize_positions(jnp.asarray(table), 8, 5))
    step = matrix(8, 5)
    expected = np.einsum("ai,bj,ijw->abw", step, step, table[1:].reshape(8, 8, 3)).reshape(25, 3)
    np.testing.assert_array_equal(found[0], table[0])
    np.testing.assert_allclose(found[1:], expected, atol=1e-5)


def test_same_grid_is_left_alone():
    table = jnp.ones((17, 2))
    assert resize_positions(table, 4, 4) is table


def test_bfloat16_table_is_resized_in_float32():
    table = np.random.default_rng(0).normal(size=(65, 2)).astype(np.float32)
    half = jnp.asarray(table).astype(jnp.bfloat16)
    found = resize_positions(half, 8, 5)
    exact = resize_positions(half.astype(jnp.float32), 8, 5)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(found), np.asarray(exact.astype(jnp.bfloat16)))
