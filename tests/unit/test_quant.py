"""Quantised arrays against plain numpy loops over blocks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from step3_jax.layout.tensor import scale_shape
from step3_jax.quant import FP8_MAX, BlockScaled, PackedInt4, dequantise, quantise


def loop_over_blocks(array, block):
    """Values and scales of one matrix, block by block."""
    rows, columns = scale_shape(array.shape, block)
    values, scales = np.empty(array.shape, ml_dtypes.float8_e4m3fn), np.empty((rows, columns), np.float32)
    for row in range(rows):
        for column in range(columns):
            place = np.s_[row * block[0] : (row + 1) * block[0], column * block[1] : (column + 1) * block[1]]
            largest = np.abs(array[place]).max()
            scales[row, column] = largest / np.float32(448) if largest else 1
            values[place] = (array[place] / scales[row, column]).astype(ml_dtypes.float8_e4m3fn)
    return values, scales


@pytest.fixture(scope="module")
def array():
    return np.random.default_rng(0).normal(size=(3, 10, 7)).astype(np.float32)


def test_partial_blocks_and_stacks_equal_the_loop(array):
    found = quantise(jnp.asarray(array), block=(4, 4))
    assert found.values.shape == array.shape
    assert found.scales.shape == (3, 3, 2)
    for expert, matrix in enumerate(array):
        values, scales = loop_over_blocks(matrix, (4, 4))
        np.testing.assert_allclose(found.scales[expert], scales, rtol=1e-6)
        real = np.asarray(found.values[expert]).astype(np.float32)
        # A scale that differs in its last bit may round a value halfway between two FP8 numbers the other way.
        assert np.mean(real == values.astype(np.float32)) > 0.95


def test_dequantise_is_the_inverse_up_to_rounding(array):
    found = np.asarray(dequantise(quantise(jnp.asarray(array), block=(4, 4))))
    # Three bits of mantissa: half a step is 1/16 of the value; below the normal range, of the block's largest / 448 / 64.
    assert np.all(np.abs(found - array) <= np.abs(array) / 16 + np.abs(array).max() / 448 / 64)


def test_dequantised_weights_quantise_to_the_same_values(array):
    first = quantise(jnp.asarray(array), block=(4, 4))
    again = quantise(dequantise(first), block=(4, 4))
    np.testing.assert_allclose(dequantise(again), dequantise(first), rtol=1e-6)


def test_block_of_zeros_has_scale_one():
    found = quantise(jnp.zeros((5, 5)), block=(4, 4))
    np.testing.assert_array_equal(found.scales, np.ones((2, 2)))
    np.testing.assert_array_equal(dequantise(found), np.zeros((5, 5)))


def test_largest_value_maps_to_448():
    found = quantise(jnp.asarray([[0.5, -3.5], [1.0, 2.0]]))
    assert FP8_MAX == 448
    assert float(found.values[0, 1]) == -448
    assert float(found.scales[0, 0]) == np.float32(3.5 / 448)


def test_rounds_to_nearest_even():
    # Scale 1: the largest is 448. Neighbours of 8 bits around 17 are 16 and 18, around 19 are 18 and 20.
    found = quantise(jnp.asarray([[448.0, 17.0, 19.0, 17.1, -17.0]]))
    np.testing.assert_array_equal(np.asarray(found.values).astype(np.float32), [[448, 16, 20, 18, -16]])


def test_dequantise_multiplies_in_float32_and_casts_last():
    scaled = BlockScaled(jnp.asarray([[3.0]], jnp.float8_e4m3fn), jnp.asarray([[1.001]]), (128, 128))
    assert dequantise(scaled, jnp.bfloat16).dtype == jnp.bfloat16
    np.testing.assert_array_equal(dequantise(scaled), np.float32(3) * np.float32([[1.001]]))


def test_a_pytree_whose_block_is_static():
    scaled = quantise(jnp.ones((4, 4)), block=(2, 2))
    assert len(jax.tree.leaves(scaled)) == 2
    doubled = jax.jit(lambda tree: BlockScaled(tree.values, tree.scales * 2, tree.block))(scaled)
    assert doubled.block == (2, 2)
    assert doubled.shape == (4, 4)
    np.testing.assert_array_equal(dequantise(doubled), np.full((4, 4), 2.0))


def test_indexing_gives_the_whole_and_nothing_else():
    scaled = quantise(jnp.ones((4, 4)))
    assert scaled[...] is scaled


def test_fewer_than_two_axes_are_refused():
    with pytest.raises(ValueError, match="fewer than two axes"):
        scale_shape((4,))


@pytest.mark.parametrize(("form", "most"), [("int8", 127), ("int4", 7)])
def test_integer_forms_round_each_group_of_a_row(form, most):
    array = np.random.default_rng(1).normal(size=(2, 3, 300)).astype(np.float32)
    expected = np.empty_like(array)
    for start in (0, 128, 256):
        group = array[..., start : start + 128]
        scale = np.abs(group).max(axis=-1, keepdims=True) / np.float32(most)
        expected[..., start : start + 128] = np.round(group / scale) * scale
    found = quantise(jnp.asarray(array), form)
    assert found.shape == array.shape
    assert found.scales.shape == (2, 3, 3)
    np.testing.assert_allclose(dequantise(found), expected, rtol=1e-6)


def test_int4_packs_columns_16_apart_in_a_byte():
    array = jnp.asarray([[7.0, *range(-7, 8), -7.0, 1.0]])
    found = quantise(array, "int4")
    assert isinstance(found, PackedInt4)
    assert found.values.shape == (1, 16)
    np.testing.assert_array_equal(found.values[0, :3] & 15, [15, 1, 2])
    # After the last column are zeros, which are stored as 8.
    np.testing.assert_array_equal(found.values[0, :3] >> 4, [1, 9, 8])
    np.testing.assert_array_equal(dequantise(found), array)


def test_a_packed_array_keeps_its_columns_through_jit():
    packed = quantise(jnp.ones((2, 33)), "int4")
    assert packed.values.shape == (2, 32)
    np.testing.assert_array_equal(jax.jit(dequantise)(packed), np.ones((2, 33)))
    assert packed[...] is packed


def test_int4_takes_no_other_block():
    with pytest.raises(ValueError, match="for each row and 128 columns"):
        quantise(jnp.ones((2, 2)), "int4", block=(2, 2))
