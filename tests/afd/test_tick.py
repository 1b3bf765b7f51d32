"""Loops over ticks: every item in turn, with the weights of its layer, whether layers are stacked or separate."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jaxtyping import Array

from step3_jax.afd.program.tick import Layers, Segment, pick, stack
from step3_jax.afd.roles import split_module
from step3_jax.stack import pick as pick_layer


class Weight(nnx.Module):
    """A layer with one number."""

    def __init__(self, value: Array) -> None:
        self.value = nnx.Param(value)


def make_layers() -> Layers[Weight]:
    """Layers 0 and 3 apart, 1 and 2 stacked, layer i with the number 10 i."""
    parts = [
        split_module(Weight(jnp.array([0]))),
        split_module(Weight(jnp.array([[10], [20]])), 2),
        split_module(Weight(jnp.array([30]))),
    ]
    return Layers(parts, [part.leaves for part in parts])


@pytest.mark.parametrize(("items", "count"), [(range(12), 3), (range(10, 12), 3), (range(3), 1), (range(2, 7), 2)])
def test_items_are_computed_in_turn_with_the_weights_of_their_layers(items: range, count: int) -> None:
    layers = make_layers()
    assert layers.count == 4

    def take(
        segment: Segment[Weight], layer: Array | int, index: Array, carry: tuple[Array, Array]
    ) -> tuple[Array, Array]:
        seen, place = carry
        row = jnp.stack([pick_layer(segment.build(layer).value[...])[0], index])
        return jax.lax.dynamic_update_index_in_dim(seen, row, place, 0), place + 1

    start = jnp.zeros((len(items), 2), jnp.int32), jnp.int32(0)
    seen, _ = jax.jit(lambda carry: layers.over_items(items, count, take, carry))(start)
    assert seen.tolist() == [[10 * (item // count), item % count] for item in items]


def test_layers_that_lie_stacked_are_one_loop() -> None:
    layers = make_layers()
    assert [(segment.first, segment.end) for segment in layers.cut(0, 4)] == [(0, 1), (1, 3), (3, 4)]
    assert [segment.scope for segment in layers.cut(1, 4)] == ["layers.1-2", "layers.3"]
    assert layers.cut(2, 2) == []


def test_a_micro_batch_is_picked_out_of_all() -> None:
    both = stack([{"a": jnp.zeros(2)}, {"a": jnp.ones(2)}])
    assert pick(both, jnp.int32(1))["a"].tolist() == [1, 1]
