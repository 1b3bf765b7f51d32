"""The decoder's layers in sequence: separate modules, or neighbours of the same structure with stacked arrays.

On CPUs and in training each layer is a separate module, and a program has all of them. On GPUs neighbours of the same
structure are a `LayerStack`: a program has one such layer, in a loop that passes the stack and the layer's number to the
kernels. So 61 layers compile in the time of three.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar, cast, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from pallas_kernels.pages import KVPages
from step3_jax.layers.attention import AttentionContext, at_layer
from step3_jax.layers.router import Routing
from step3_jax.layout.tensor import Path
from step3_jax.stack import LayerOf

M = TypeVar("M", bound=nnx.Module)
T = TypeVar("T")

# Of a stack's arrays, what stands in their path after the stack's number.
STACKED = "stacked"


@runtime_checkable
class Layer(Protocol):
    """A layer as `over_layers` calls it; see `text.DecoderLayer`."""

    def __call__(
        self, hidden: Float[Array, "B T D"], context: AttentionContext, pages: KVPages | None = None
    ) -> tuple[Float[Array, "B T D"], KVPages | None, Routing | None]:
        """The residual stream, the pool with the layer's rows, and the routing of a layer with experts."""
        ...


class LayerStack(nnx.Module, Generic[M]):
    """Neighbouring layers of the same structure, with all their arrays stacked.

    Attributes:
      stacked: The module of one layer, with the arrays of all layers, [count, ...].
      count: Layers.
    """

    def __init__(self, stacked: M, count: int) -> None:
        self.stacked = stacked
        self.count = count

    def at(self, index: Int[Array, ""] | int) -> M:
        """The module of a layer, counted from the first of the stack; each of its weights is a place in a stack."""
        return layer_at(self.stacked, index)


def layer_at(stacked: M, index: Int[Array, ""] | int) -> M:
    """The module of one layer of a module that holds stacks; no array is touched."""
    number = jnp.asarray(index, jnp.int32)
    return _map_values(stacked, lambda value: LayerOf(value, number))


def layer_modules(layers: Sequence[M | LayerStack[M]]) -> list[M]:
    """Each module of a layer once; that of a stack stands for all its layers."""
    return [part.stacked if isinstance(part, LayerStack) else part for part in layers]


def count_layers(layers: Sequence[nnx.Module]) -> int:
    """Layers of modules and stacks together."""
    return sum(part.count if isinstance(part, LayerStack) else 1 for part in layers)


def over_layers(
    layers: Sequence[Layer | LayerStack],
    hidden: Float[Array, "B T D"],
    context: AttentionContext,
    pages: KVPages | None = None,
    observe: Callable[[Routing], T] | None = None,
) -> tuple[Float[Array, "B T D"], KVPages | None, list[T]]:
    """Runs layers one after the other.

    Args:
      layers: Modules and stacks of them.
      hidden: The residual stream before the first.
      context: What they share.
      pages: The pool of all layers; None without a cache.
      observe: Applied to each routing; returns a pytree of arrays.

    Returns:
      The residual stream after the last layer, the pool with the new rows, and what `observe` gave: an entry for each
      module or stack with experts, its arrays with an axis of layers in front.
    """
    layer_pages = 0 if pages is None else pages.num_pages // count_layers(layers)
    found: list[T] = []
    first = 0
    for part in layers:
        if isinstance(part, LayerStack):
            hidden, pages, seen = _run_stack(part, first, hidden, context, pages, layer_pages, observe)
            first += part.count
        else:
            with jax.named_scope(f"layers.{first}"):
                hidden, pages, routing = part(hidden, at_layer(context, first, layer_pages), pages)
            is_seen = observe is not None and routing is not None
            seen = jax.tree.map(lambda array: array[None], observe(routing)) if is_seen else None
            first += 1
        if seen is not None:
            found.append(seen)
    return hidden, pages, found


def _run_stack(
    stack: LayerStack,
    first: int,
    hidden: Float[Array, "B T D"],
    context: AttentionContext,
    pages: KVPages | None,
    layer_pages: int,
    observe: Callable[[Routing], T] | None,
) -> tuple[Float[Array, "B T D"], KVPages | None, T | None]:
    """A loop over a stack whose first layer has the number `first`; see `over_layers`."""
    carry_of = tuple[Int[Array, ""], Float[Array, "B T D"], KVPages | None]

    def step(carry: carry_of, _: None) -> tuple[carry_of, T | None]:
        index, hidden, pages = carry
        hidden, pages, routing = stack.at(index)(hidden, at_layer(context, first + index, layer_pages), pages)
        seen = observe(routing) if observe is not None and routing is not None else None
        return (index + 1, hidden, pages), seen

    with jax.named_scope(f"layers.{first}-{first + stack.count - 1}"):
        # The number of turns is known, so that nothing is read back from the device to decide on the next one.
        start = jnp.zeros((), jnp.int32), hidden, pages
        (_, hidden, pages), seen = jax.lax.scan(step, start, None, length=stack.count)
    return hidden, pages, seen


def stack_layers(layers: Sequence[M | LayerStack[M]]) -> list[LayerStack[M]]:
    """Stacks neighbours whose modules and arrays have the same structure, shapes and dtypes.

    The stacks of arrays are copies; `checkpoint.load` fills stacks without any. Of shapes (`jax.ShapeDtypeStruct`) they are
    shapes, with the sharding of one layer after the axis of layers. What is a stack already stays so.
    """
    stacks: list[LayerStack[M]] = []
    for group in group_layers(layers):
        own = [layers[index] for index in group]
        if isinstance(own[0], LayerStack):
            stacks += cast(list[LayerStack[M]], own)
            continue
        graphdef, state = nnx.split(own[0])
        values = [[variable.get_value() for _, variable in nnx.to_flat_state(nnx.state(layer))] for layer in own]
        flat = [
            (path, variable.replace(jax.tree.map(lambda *leaves: _stack_leaves(leaves), *of_layers)))
            for (path, variable), of_layers in zip(nnx.to_flat_state(state), zip(*values, strict=True), strict=True)
        ]
        stacks.append(LayerStack(nnx.merge(graphdef, nnx.from_flat_state(flat)), len(own)))
    return stacks


def group_layers(layers: Sequence[nnx.Module], held: Sequence[object] | None = None) -> list[list[int]]:
    """Which layers make a stack each: the numbers of neighbours of one form.

    Args:
      layers: Modules, whose arrays may be shapes. One form is the same structure of modules and arrays, the same shapes and
        dtypes.
      held: What else neighbours have in common: how the arrays of each layer are going to be held, if they are not so yet.
    """
    forms = [(_form(layer), None if held is None else held[index]) for index, layer in enumerate(layers)]
    groups = itertools.groupby(range(len(layers)), key=forms.__getitem__)
    return [list(group) for _, group in groups]


def unstack_layers(layers: Sequence[M | LayerStack[M]]) -> list[M]:
    """The layers as modules of their own; each weight of a stacked one is a place in its stack, and nothing is copied."""
    found: list[M] = []
    for part in layers:
        found += [part.at(index) for index in range(part.count)] if isinstance(part, LayerStack) else [part]
    return found


def is_stacked(path: Path) -> bool:
    """Whether the parameter at `path` of a `Step3` lies in a stack, its first axis being that of layers."""
    return path[:2] == ("text", "layers") and path[3] == STACKED


def _map_values(module: M, change: Callable[[object], object]) -> M:
    """A module like `module` with other values."""
    graphdef, state = nnx.split(module)
    # New variables: those of `state` are the module's own.
    flat = [(path, variable.replace(change(variable.get_value()))) for path, variable in nnx.to_flat_state(state)]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def _form(layer: nnx.Module) -> tuple[object, ...]:
    """What two layers of a stack have in common."""
    graphdef, state = nnx.split(layer)
    leaves, treedef = jax.tree.flatten(state)
    return graphdef, treedef, [(leaf.shape, leaf.dtype) for leaf in leaves]


def _stack_leaves(leaves: Sequence[Array] | Sequence[jax.ShapeDtypeStruct]) -> Array | jax.ShapeDtypeStruct:
    first = leaves[0]
    if not isinstance(first, jax.ShapeDtypeStruct):
        return jnp.stack(leaves)
    sharding = first.sharding
    if isinstance(sharding, NamedSharding):
        sharding = stack_sharding(sharding)
    return jax.ShapeDtypeStruct((len(leaves), *first.shape), first.dtype, sharding=sharding)


def stack_sharding(sharding: NamedSharding) -> NamedSharding:
    """Of a stack whose layers lie as `sharding` says: every device has its part of all layers."""
    return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
