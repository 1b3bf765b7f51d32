"""A layer of a stack stands for the layer's own weight."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from step3_jax.quant import BlockScaled, quantise
from step3_jax.stack import LayerOf, parts, pick


@pytest.fixture
def stack():
    return jnp.arange(24, dtype=jnp.float32).reshape(3, 2, 4)


def test_a_layer_has_the_shape_of_one_and_picks_it(stack):
    layer = LayerOf(stack, jnp.int32(2))
    assert layer.shape == (2, 4)
    assert layer[...] is layer
    np.testing.assert_array_equal(jax.jit(lambda layer: pick(layer))(layer), stack[2])


def test_a_quantised_layer_is_picked_with_its_scales(stack):
    quantised = quantise(stack, block=(2, 2))
    layer = LayerOf(quantised, jnp.int32(1))
    assert layer.shape == (2, 4)
    found = jax.jit(lambda layer: layer.pick())(layer)
    assert isinstance(found, BlockScaled)
    assert found.block == (2, 2)
    np.testing.assert_array_equal(found.values, quantised.values[1])
    np.testing.assert_array_equal(found.scales, quantised.scales[1])


def test_parts_are_stack_and_layer_or_the_weight_alone(stack):
    index = jnp.int32(1)
    found, layer = parts(LayerOf(stack, index))
    assert found is stack
    assert layer is index
    assert parts(stack) == (stack, None)
    assert pick(stack) is stack
