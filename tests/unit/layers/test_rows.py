"""Quantised rows: made once, read unchanged, plain on request."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quantise import quantise_rows
from step3_jax.layers.rows import Rows, as_plain, as_rows, map_tokens

HIDDEN = jnp.asarray(np.random.default_rng(0).normal(size=(5, 256)), jnp.float32)


def test_rows_are_quantised_once() -> None:
    rows = as_rows(HIDDEN)
    values, scales = quantise_rows(HIDDEN, scales_layout="columns")
    np.testing.assert_array_equal(rows.values.astype(jnp.float32), values.astype(jnp.float32))
    np.testing.assert_array_equal(rows.scales, scales)
    assert rows.shape == HIDDEN.shape
    assert rows.dtype == jnp.float32
    assert as_rows(rows) is rows


def test_plain_rows_are_those_that_were_kept() -> None:
    rows = as_rows(HIDDEN)
    assert as_plain(HIDDEN) is HIDDEN
    assert as_plain(Rows(rows.values, rows.scales, HIDDEN, rows.dtype)) is HIDDEN
    with pytest.raises(ValueError, match="only the quantised form"):
        as_plain(rows)


def test_other_tokens_bring_their_scales_along() -> None:
    order = np.array([4, 0, 0, 3, 1, 2, 2])
    moved = map_tokens(as_rows(HIDDEN), lambda array: array[order])
    expected = as_rows(HIDDEN[order])
    np.testing.assert_array_equal(moved.values.astype(jnp.float32), expected.values.astype(jnp.float32))
    np.testing.assert_array_equal(moved.scales[:, :7], expected.scales[:, :7])
    assert moved.scales.shape == expected.scales.shape
