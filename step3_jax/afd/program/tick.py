"""Loops over ticks: an iteration computes one layer of one micro-batch, and only the device knows which.

What the next tick needs goes through the loop's carry. So a program grows with the number of different layers, not with
the number of micro-batches, and the compiler cannot move a tick's work across an exchange. Layers that are
stacked (on GPUs) are one loop, which finds their weights by number. Each layer that is not stacked (on CPUs) has its
own loop over the micro-batches: a choice between layers inside one loop (`jax.lax.switch`) would be as small, but
copies the KV cache with jax 0.10.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from step3_jax.afd.roles import Part

M = TypeVar("M", bound=nnx.Module)
T = TypeVar("T")
Carry = TypeVar("Carry")

# A layer's number: static where each layer has its own loop.
Number = Int[Array, ""] | int


@dataclasses.dataclass(frozen=True)
class Segment(Generic[M]):
    """Neighbouring layers that one loop serves.

    Attributes:
      first: The first of them.
      end: The layer after the last one.
      build: Builds the block of one of these layers.
    """

    first: int
    end: int
    build: Callable[[Number], M]

    @property
    def scope(self) -> str:
        """Name of the layers in a profile."""
        return f"layers.{self.first}" if self.end == self.first + 1 else f"layers.{self.first}-{self.end - 1}"


class Layers(Generic[M]):
    """One role's halves of all layers, as loops take them.

    Attributes:
      count: L.
    """

    def __init__(self, parts: Sequence[Part[M]], leaves: Sequence[Sequence[Array]]) -> None:
        """Takes the parts and their arrays, which may be tracers."""
        self._segments: list[Segment[M]] = []
        first = 0
        for part, own in zip(parts, leaves, strict=True):
            end = first + part.num_layers
            self._segments.append(Segment(first, end, functools.partial(_build_layer, part, own, first)))
            first = end
        self.count = first

    def cut(self, first: int, end: int) -> list[Segment[M]]:
        """Segments of the layers [first, end)."""
        found = (
            dataclasses.replace(segment, first=max(first, segment.first), end=min(end, segment.end))
            for segment in self._segments
        )
        return [segment for segment in found if segment.first < segment.end]

    def over_items(
        self,
        items: range,
        num_microbatches: int,
        take: Callable[[Segment[M], Number, Int[Array, ""], Carry], Carry],
        carry: Carry,
    ) -> Carry:
        """Computes items in order; item i is layer i // n of micro-batch i % n.

        Args:
          items: A range of consecutive items.
          num_microbatches: n.
          take: (segment, layer, micro-batch, carry) -> carry; the layer is one of the segment's.
          carry: Passed from one item to the next.
        """
        count = num_microbatches
        for segment in self.cut(items.start // count, -(-items.stop // count)):

            def take_item(item: Int[Array, ""], carry: Carry, segment: Segment[M] = segment) -> Carry:
                layer = segment.first if segment.end == segment.first + 1 else item // count
                return take(segment, layer, item - layer * count, carry)

            first, end = max(items.start, segment.first * count), min(items.stop, segment.end * count)
            carry = jax.lax.fori_loop(first, end, take_item, carry)
        return carry


def pick(tree: T, index: Int[Array, ""]) -> T:
    """One micro-batch's entry of stacked arrays."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), tree)


def stack(trees: Sequence[T]) -> T:
    """Stacks the arrays of all micro-batches."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _build_layer(part: Part[M], leaves: Sequence[Array], first: int, layer: Number) -> M:
    return part.build(leaves, layer - first)
