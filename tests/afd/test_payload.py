"""What crosses between the roles comes out as it went in, up to what FP8 rounds."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from step3_jax.afd.payload import PayloadFormat
from step3_jax.config import TextConfig


def sample(hidden_size: int, top_k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    hidden = rng.standard_normal((5, hidden_size)).astype(np.float32) * rng.lognormal(0, 3, (5, 1)).astype(np.float32)
    return hidden, rng.integers(0, 300, (5, top_k)).astype(np.int32), rng.random((5, top_k)).astype(np.float32)


@pytest.mark.parametrize("hidden_size", [48, 128, 200, 512])
@pytest.mark.parametrize("payload", ["fp8", "bfloat16", "float32"])
def test_rows_come_out_as_they_went_in(payload: str, hidden_size: int) -> None:
    form = PayloadFormat(payload, hidden_size, 3)
    hidden, experts, weights = sample(hidden_size, 3)
    rows = form.pack(jnp.asarray(hidden), jnp.asarray(experts), jnp.asarray(weights))
    assert rows.shape == (5, form.row_bytes)
    assert rows.dtype == jnp.uint8
    found, found_experts, found_weights = form.unpack(rows, jnp.float32)
    np.testing.assert_array_equal(found_experts, experts)
    np.testing.assert_array_equal(found_weights, weights)
    if payload == "float32":
        np.testing.assert_array_equal(found, hidden)
    elif payload == "bfloat16":
        np.testing.assert_array_equal(found, jnp.asarray(hidden).astype(jnp.bfloat16).astype(jnp.float32))
    else:
        # e4m3 has 3 bits of mantissa; below a 2^-9th of a block's largest it is spaced evenly.
        wide = np.pad(np.abs(hidden), ((0, 0), (0, -hidden_size % 128))).reshape(5, -1, 128)
        limit = np.repeat(wide.max(axis=2), 128, axis=1)[:, :hidden_size] * 2**-15
        assert np.all(np.abs(found - hidden) <= np.maximum(np.abs(hidden) * 2**-4, limit) * 1.001)


def test_the_sizes_of_the_released_model() -> None:
    config = TextConfig()
    # 7168 values, 56 scales, 3 ids and weights.
    assert PayloadFormat.of(config, "fp8").row_bytes == 7168 + 56 * 4 + 3 * 2 + 3 * 4
    assert PayloadFormat.of(config, "bfloat16").row_bytes == 2 * 7168 + 18
    assert [PayloadFormat.of(config, name).output_bytes for name in ("fp8", "bfloat16", "float32")] == [
        2 * 7168,
        2 * 7168,
        4 * 7168,
    ]


def test_dense_layers_send_rows_of_the_same_form() -> None:
    form = PayloadFormat("fp8", 128, 2)
    hidden = jnp.ones((3, 128))
    rows = form.pack(hidden)
    assert rows.shape == (3, form.row_bytes)
    found, experts, weights = form.unpack(rows, jnp.float32)
    np.testing.assert_array_equal(found, hidden)
    assert not experts.any()
    assert not weights.any()


@pytest.mark.parametrize(("payload", "dtype"), [("fp8", jnp.bfloat16), ("bfloat16", jnp.bfloat16), ("float32", None)])
def test_what_comes_back(payload: str, dtype: jnp.dtype | None) -> None:
    form = PayloadFormat(payload, 48, 2)
    out = jnp.asarray(sample(48, 2)[0])
    rows = form.pack_output(out)
    assert rows.shape == (5, form.output_bytes)
    expected = out if dtype is None else out.astype(dtype).astype(jnp.float32)
    np.testing.assert_array_equal(form.unpack_output(rows, jnp.float32), expected)


def test_rows_of_zeros_and_of_large_values_stay_finite() -> None:
    form = PayloadFormat("fp8", 256, 1)
    hidden = jnp.stack([jnp.zeros((256,)), jnp.full((256,), 3e38), jnp.full((256,), 448.0)])
    found, _, _ = form.unpack(form.pack(hidden), jnp.float32)
    np.testing.assert_allclose(found, hidden, rtol=1e-6)
