"""Change of dtype in bands: bit for bit what the definition says, however the band is cut."""

from __future__ import annotations

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from step3_jax.checkpoint.transform import BandError, cast_band, dequantise_band, measure_error, quantise_band
from step3_jax.quant import BlockScaled, dequantise, quantise

FP8 = ml_dtypes.float8_e4m3fn


def exact_quantise(values, block):
    """The definition, one block at a time, with numpy's own rounding."""
    matrices, rows, columns = values.shape
    out = np.empty(values.shape, FP8)
    scales = np.empty((matrices, -(-rows // block[0]), -(-columns // block[1])), np.float32)
    for matrix, i, j in np.ndindex(scales.shape):
        place = (matrix, slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
        part = values[place].astype(np.float32)
        largest = np.abs(part).max()
        scale = largest / np.float32(448) if largest > 0 else np.float32(1)
        scales[matrix, i, j] = scale
        out[place] = (part / scale).astype(FP8)
    return out, scales


def make_values(shape, dtype, seed=0):
    rng = np.random.default_rng(seed)
    # Far apart, so that blocks have values in every range of FP8, and zeros.
    values = rng.standard_normal(shape) * np.exp(rng.uniform(-12, 0, shape))
    return values.astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(1, 128, 128), (2, 130, 300), (1, 1, 5), (3, 256, 64), (1, 500, 129)])
def test_fp8_is_the_definition_bit_for_bit(dtype, shape):
    values = make_values(shape, dtype)
    values[0, : min(shape[1], 128), :128] = 0
    codes, scales = quantise_band(values, (128, 128))
    right_codes, right_scales = exact_quantise(values, (128, 128))
    assert scales.tobytes() == right_scales.tobytes()
    assert codes.tobytes() == right_codes.tobytes()


def test_every_code_and_every_tie_is_rounded_to_nearest_even():
    codes = np.arange(256, dtype=np.uint8).view(FP8)
    codes = codes[np.isfinite(codes.astype(np.float32))].astype(np.float32)
    ordered = np.sort(codes)
    ties = (ordered[1:] + ordered[:-1]) / 2
    near = [np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(-np.inf))]
    scaled = np.concatenate([codes, ties, *near]).astype(np.float32)
    # The largest is 448 and the scale 1, so the values are the scaled ones.
    values, scales = quantise_band(scaled.reshape(1, 1, -1), (1, scaled.size))
    assert scales.reshape(-1) == [1.0]
    assert values.tobytes() == scaled.astype(FP8).tobytes()


def test_blocks_are_as_in_quant():
    values = make_values((2, 200, 150), ml_dtypes.bfloat16)
    codes, scales = quantise_band(values, (64, 32))
    expected = quantise(jnp.asarray(values), block=(64, 32))
    assert scales.tobytes() == np.asarray(expected.scales).tobytes()
    assert codes.tobytes() == np.asarray(expected.values).tobytes()


def test_every_code_is_decoded():
    codes = np.arange(256, dtype=np.uint8).view(FP8).reshape(1, 2, 128)
    for dtype in (np.float32, ml_dtypes.bfloat16):
        found = dequantise_band(codes, np.full((1, 1, 1), 0.5, np.float32), (128, 128), np.dtype(dtype))
        np.testing.assert_array_equal(found.astype(np.float32), codes.astype(np.float32) / 2)  # NaN included


@pytest.mark.parametrize("exponent", [-133, -126, -110, -101, -100, -99, 0, 119])
def test_blocks_of_any_size_of_numbers_are_the_definition(exponent):
    values = np.ldexp(make_values((1, 4, 300), np.float32), exponent).astype(np.float32)
    codes, scales = quantise_band(values, (128, 128))
    right_codes, right_scales = exact_quantise(values, (128, 128))
    assert scales.tobytes() == right_scales.tobytes()
    assert codes.tobytes() == right_codes.tobytes()


def test_a_block_whose_scale_would_be_zero_becomes_zeros():
    values = np.full((1, 4, 4), 1e-45, np.float32)
    for codes, scales in (
        quantise_band(values, (128, 128)),
        (quantise(jnp.asarray(values)).values, quantise(jnp.asarray(values)).scales),
        (quantise(jnp.full((1, 4, 4), 2e-36)).values, np.ones((1, 1, 1))),  # XLA takes subnormal scales for zeros
    ):
        assert np.asarray(scales).item() == 1
        assert not np.asarray(codes).view(np.uint8).any()


def test_numbers_near_the_smallest_float_are_kept():
    values = np.full((1, 4, 4), 1e-40, np.float32)
    values[0, 0, 0] = 2e-40
    codes, scales = quantise_band(values, (128, 128))
    right_codes, right_scales = exact_quantise(values, (128, 128))
    assert scales.tobytes() == right_scales.tobytes()
    assert codes.tobytes() == right_codes.tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_what_is_not_finite_is_refused(bad, dtype):
    values = make_values((1, 140, 20), dtype)
    values[0, 139, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantise_band(values, (128, 128))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_dequantised_is_value_times_scale_in_float32(dtype):
    codes, scales = quantise_band(make_values((2, 200, 150), np.float32), (128, 128))
    found = dequantise_band(codes, scales, (128, 128), np.dtype(dtype))
    expected = dequantise(BlockScaled(jnp.asarray(codes), jnp.asarray(scales)), dtype)
    assert found.dtype == dtype
    assert found.tobytes() == np.asarray(expected).tobytes()


def test_cast_rounds_to_nearest_even():
    values = np.array([[[1.0, 1 + 2**-8, 1 + 3 * 2**-8, -3.14159]]], np.float32)
    found = cast_band(values, np.dtype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(found.astype(np.float32)[0, 0, :3], [1.0, 1.0, 1 + 2**-6])
    halves = np.array([[[0.1, 65504.0]]], np.float16)
    np.testing.assert_array_equal(cast_band(halves, np.dtype(np.float32)), halves.astype(np.float32))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_error_is_the_difference_and_adds_up(dtype):
    stored = make_values((2, 300, 200), dtype)
    values = stored.astype(np.float32)
    codes, scales = quantise_band(values, (128, 128))
    found = dequantise_band(codes, scales, (128, 128), np.dtype(np.float32))
    error = measure_error(stored, codes, scales)
    assert error.largest == np.abs(found - values).max()
    rms = np.sqrt(np.mean(np.square(found - values, dtype=np.float64)) / np.mean(np.square(values, dtype=np.float64)))
    assert error.relative_rms == pytest.approx(rms, rel=1e-5)
    halves = [measure_error(stored[i : i + 1], codes[i : i + 1], scales[i : i + 1]) for i in range(2)]
    assert (halves[0] + halves[1]).relative_rms == pytest.approx(error.relative_rms, rel=1e-6)
    assert (halves[0] + halves[1]).largest == error.largest


def test_error_of_zeros_is_zero():
    assert BandError().relative_rms == 0
    assert measure_error(np.zeros((1, 2, 3), np.float32), np.zeros((1, 2, 3), np.float32)) == BandError()
