"""One layer of stacked weights: the stack and the layer's number, so that a loop over layers slices nothing.

On GPUs, layers of the same structure are one array per parameter, [L, ...], and a loop over them is one small program
instead of L large ones. A module of one layer then holds `LayerOf` in place of each weight. Code that reads a weight asks
`parts` for the stack and the layer, and passes both to a kernel, which finds its layer by address. A slice of a stack would
be copied by some programs, and makes a GPU's driver change the recorded launches in every layer.
"""

from __future__ import annotations

import dataclasses
import types
from typing import TypeVar

import jax
from jaxtyping import Array, Int, Shaped

from step3_jax.quant import Quantised


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerOf:
    """A layer's weight as an index into a stack.

    Attributes:
      stack: The weights of L layers, [L, ...]: an array, or quantised.
      index: Which of them, 0 to L - 1; may be traced.
    """

    stack: Shaped[Array, "L *shape"] | Quantised
    index: Int[Array, ""]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one layer's weight."""
        return self.stack.shape[1:]

    def __getitem__(self, index: types.EllipsisType) -> LayerOf:
        """`array[...]` is the array itself: so reads `nnx.Param` its value."""
        if index is not ...:
            raise ValueError(f"a layer of a stack takes no index but [...]; {index!r} was given")
        return self

    def pick(self) -> Shaped[Array, "*shape"] | Quantised:
        """The layer's weight sliced out of the stack: the references do that; kernels do not need it."""
        return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, self.index, keepdims=False), self.stack)


# A separate weight, in any form.
W = TypeVar("W")


def parts(weight: W | LayerOf) -> tuple[W | Shaped[Array, "L *shape"] | Quantised, Int[Array, ""] | None]:
    """The arguments of a kernel: the weight and None, or a stack and the number of the layer in it."""
    return (weight.stack, weight.index) if isinstance(weight, LayerOf) else (weight, None)


def pick(weight: W | LayerOf) -> W | Shaped[Array, "*shape"] | Quantised:
    """The weight itself, sliced out of its stack if it is in one."""
    return weight.pick() if isinstance(weight, LayerOf) else weight
