"""FP8 activations with 1 x 128 scales."""

from __future__ import annotations

import inspect

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quantise import quantise_rows, scales_shape, scales_to_rows
from step3_jax import quant


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    """Rows of very different sizes, one block of zeros, and a partial last block."""
    random = np.random.default_rng(0)
    rows = random.standard_normal((6, 300)) * 10.0 ** random.integers(-6, 6, (6, 1))
    rows[2, 128:256] = 0
    return rows.astype(np.float32)


def test_rows_are_quantised_as_the_checkpoint_is(rows: np.ndarray) -> None:
    values, scales = quantise_rows(jnp.asarray(rows))
    expected = quant.quantise(jnp.asarray(rows), block=(1, 128))
    np.testing.assert_array_equal(values.astype(jnp.float32), expected.values.astype(jnp.float32))
    # XLA multiplies by 1 / 448 here, which may change the last bit.
    np.testing.assert_allclose(scales, expected.scales, rtol=2e-7)
    assert scales[2, 1] == 1


def test_every_block_reaches_the_largest_value_and_loses_at_most_a_sixteenth(rows: np.ndarray) -> None:
    values, scales = quantise_rows(jnp.asarray(rows))
    wide = np.asarray(values.astype(jnp.float32))
    assert np.abs(wide[:, :128]).max(axis=1).tolist() == [448.0] * 6
    restored = wide * np.repeat(np.asarray(scales), 128, axis=1)[:, :300]
    # Normal numbers have 3 bits of mantissa; below 2^-6 the steps are equal, 2^-9.
    bound = np.maximum(np.abs(rows) / 16, np.repeat(np.asarray(scales), 128, axis=1)[:, :300] * 2**-10)
    assert (np.abs(restored - rows) <= bound * 1.0001).all()


def test_columns_hold_the_same_scales_transposed(rows: np.ndarray) -> None:
    values, scales = quantise_rows(jnp.asarray(rows))
    same_values, columns = quantise_rows(jnp.asarray(rows), scales_layout="columns")
    assert columns.shape == scales_shape(rows.shape, "columns") == (3, 8)
    np.testing.assert_array_equal(values.astype(jnp.float32), same_values.astype(jnp.float32))
    np.testing.assert_array_equal(scales_to_rows(columns, 6), scales)
    assert (columns[:, 6:] == 1).all()


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'diagonal'; allowed: rows, columns"):
        inspect.unwrap(quantise_rows)(jnp.ones((1, 128)), scales_layout="diagonal")
