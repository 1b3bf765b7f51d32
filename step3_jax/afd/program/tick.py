"""Loops over ticks: of the layer and the micro-batch that a tick computes, only the device knows the numbers.

One layer of one micro-batch is an iteration, and what the next one needs of it goes through the loop's carry. So a program
is as large as its layers are different, not as many times larger as there are micro-batches, and no compiler can move a
tick's work to the other side of an exchange. Layers that lie stacked (on GPUs) are found by their number; of separate ones
(on CPUs) `jax.lax.switch` takes one, so that no weight is copied.
"""

from __future__ import annotations

import abc
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
R = TypeVar("R")
T = TypeVar("T")
Carry = TypeVar("Carry")


@dataclasses.dataclass(frozen=True)
class Segment(abc.ABC, Generic[M]):
    """Neighbouring layers that one loop serves.

    Attributes:
      first: The first of them.
      end: The layer behind the last of them.
    """

    first: int
    end: int

    @abc.abstractmethod
    def call(self, layer: Int[Array, ""] | int, run: Callable[..., R], *operands: object) -> R:
        """What `run(block, *operands)` gives, with the block of one of these layers."""


@dataclasses.dataclass(frozen=True)
class SeparateSegment(Segment[M]):
    """Layers whose arrays lie apart.

    Attributes:
      blocks: Of each.
    """

    blocks: Sequence[M]

    def call(self, layer: Int[Array, ""] | int, run: Callable[..., R], *operands: object) -> R:
        """See `Segment.call`."""

        def run_layer(number: int, block: M, *operands: object) -> R:
            with jax.named_scope(f"layers.{number}"):
                return run(block, *operands)

        branches = [functools.partial(run_layer, self.first + index, block) for index, block in enumerate(self.blocks)]
        if len(branches) == 1:
            return branches[0](*operands)
        return jax.lax.switch(layer - self.first, branches, *operands)  # type: ignore[no-any-return]


@dataclasses.dataclass(frozen=True)
class StackedSegment(Segment[M]):
    """Layers of one form whose arrays are stacked.

    Attributes:
      build: Makes the block of the layer of a number, which counts from the stack's first.
      first_stacked: The stack's first layer.
    """

    build: Callable[[Int[Array, ""]], M]
    first_stacked: int

    def call(self, layer: Int[Array, ""] | int, run: Callable[..., R], *operands: object) -> R:
        """See `Segment.call`."""
        with jax.named_scope("layers"):
            return run(self.build(jnp.asarray(layer - self.first_stacked, jnp.int32)), *operands)


class Layers(Generic[M]):
    """One role's halves of all layers, as a loop takes them.

    Attributes:
      count: L.
    """

    def __init__(self, parts: Sequence[Part[M]], leaves: Sequence[Sequence[Array]]) -> None:
        """Takes the parts and their arrays, which may be tracers."""
        self._segments: list[Segment[M]] = []
        first = 0
        for part, own in zip(parts, leaves, strict=True):
            end = first + part.num_layers
            last = self._segments[-1] if self._segments else None
            if part.is_stacked:
                self._segments.append(
                    StackedSegment(first, end, functools.partial(part.skeleton.build_layer, own), first)
                )
            elif isinstance(last, SeparateSegment):
                blocks = [*last.blocks, part.skeleton.build(own)]
                self._segments[-1] = SeparateSegment(last.first, end, blocks)
            else:
                self._segments.append(SeparateSegment(first, end, [part.skeleton.build(own)]))
            first = end
        self.count = first

    def cut(self, first: int, end: int) -> list[Segment[M]]:
        """Segments of the layers [first, end)."""
        found: list[Segment[M]] = []
        for segment in self._segments:
            low, high = max(first, segment.first), min(end, segment.end)
            if low >= high:
                continue
            if isinstance(segment, SeparateSegment):
                blocks = segment.blocks[low - segment.first : high - segment.first]
                found.append(dataclasses.replace(segment, first=low, end=high, blocks=blocks))
            else:
                found.append(dataclasses.replace(segment, first=low, end=high))
        return found

    def over_items(
        self,
        items: range,
        num_microbatches: int,
        take: Callable[[Segment[M], Int[Array, ""], Int[Array, ""], Carry], Carry],
        carry: Carry,
    ) -> Carry:
        """Computes items in order; item i is layer i // n of micro-batch i % n.

        Args:
          items: Neighbouring numbers.
          num_microbatches: n.
          take: (segment, layer, micro-batch, carry) -> carry; the layer is one of the segment's.
          carry: What goes from one item to the next.
        """
        count = num_microbatches
        for segment in self.cut(items.start // count, -(-items.stop // count)):

            def take_item(item: Int[Array, ""], carry: Carry, segment: Segment[M] = segment) -> Carry:
                return take(segment, item // count, item % count, carry)

            first, end = max(items.start, segment.first * count), min(items.stop, segment.end * count)
            carry = jax.lax.fori_loop(first, end, take_item, carry)
        return carry


def pick(tree: T, index: Int[Array, ""]) -> T:
    """One entry of arrays that have one for each micro-batch."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), tree)


def stack(trees: Sequence[T]) -> T:
    """Arrays with one entry for each micro-batch, of those of each."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
