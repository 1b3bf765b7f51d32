"""Layers that go straight into stacks: what is loaded of one is copied to its place and given up.

So a device holds the stacks and, for each thread that loads, one parameter of one layer.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Int, Shaped

from step3_jax.checkpoint.names import parameters_of
from step3_jax.layout.tensor import Path
from step3_jax.model.layers import LayerStack, group_layers, stack_sharding
from step3_jax.model.step3 import Step3
from step3_jax.model.text import DecoderLayer
from step3_jax.quant import BlockScaled

Value = Shaped[Array, "..."] | BlockScaled
_LAYERS = ("text", "layers")


class StackFiller:
    """The stacks of a model under way. `put` may be called by several threads at once."""

    def __init__(self, model: Step3, is_quantised: Callable[[Path], bool]) -> None:
        """Decides which layers make a stack, see `group_layers`.

        Args:
          model: With layers apart; their arrays may be shapes. It is changed by `finish`.
          is_quantised: Whether a parameter is going to be loaded as values and scales.
        """
        self._model = model
        paths: list[list[Path]] = [[] for _ in model.text.layers]
        for path in parameters_of(model):
            if path[:2] == _LAYERS:
                paths[int(path[2])].append(path)
        self._groups = group_layers(model.text.layers, [list(map(is_quantised, own)) for own in paths])
        self._group_of = {layer: group for group in self._groups for layer in group}
        self._stacks = {(group[0], path[3:]): _Stack(len(group)) for group in self._groups for path in paths[group[0]]}

    def put(self, path: Path, value: Value) -> Value | None:
        """Takes what is loaded of a layer.

        Args:
          path: Of the parameter, in the model whose layers are apart.
          value: The parameter where it is to lie.

        Returns:
          None, or the value if it belongs to no layer.
        """
        if path[:2] != _LAYERS:
            return value
        layer = int(path[2])
        group = self._group_of[layer]
        self._stacks[group[0], path[3:]].put(layer - group[0], value)
        return None

    def finish(self) -> None:
        """Gives the model its stacks, all layers having been put."""
        layers: list[DecoderLayer | LayerStack[DecoderLayer]] = []
        for group in self._groups:
            module = cast(DecoderLayer, self._model.text.layers[group[0]])
            for path, variable in parameters_of(module).items():
                variable.set_value(self._stacks.pop((group[0], path)).finish())
            layers.append(LayerStack(module, len(group)))
        self._model.text.layers = nnx.List(layers)


class _Stack:
    """One parameter of all layers of a stack; of a quantised one values and scales."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._lock = threading.Lock()
        self._treedef: jax.tree_util.PyTreeDef | None = None
        self._leaves: list[_StackLeaf] = []

    def put(self, index: int, value: Value) -> None:
        leaves, treedef = jax.tree.flatten(value)
        with self._lock:
            if self._treedef is None:
                self._treedef = treedef
                self._leaves = [_StackLeaf(self._count, leaf) for leaf in leaves]
            for own, leaf in zip(self._leaves, leaves, strict=True):
                own.put(index, leaf)

    def finish(self) -> Value:
        if self._treedef is None:
            raise ValueError("a stack is finished before any of its layers is loaded")
        return jax.tree.unflatten(self._treedef, [leaf.finish() for leaf in self._leaves])


class _StackLeaf:
    """A stacked array: on each device of this process the part of all layers that the device has."""

    def __init__(self, count: int, like: Array) -> None:
        self._shape = (count, *like.shape)
        self._sharding, self._dtype = like.sharding, like.dtype
        # All at once and first, so that what is loaded meanwhile leaves no gaps between the stacks.
        self._parts = {
            shard.device: jnp.zeros((count, *shard.data.shape), like.dtype, device=shard.device)
            for shard in like.addressable_shards
        }

    def put(self, index: int, layer: Array) -> None:
        for shard in layer.addressable_shards:
            stack = self._parts.pop(shard.device)
            self._parts[shard.device] = _set_layer(stack, shard.data, index)
        # Until then the layer's own array is needed.
        jax.block_until_ready(list(self._parts.values()))

    def finish(self) -> Array:
        parts = list(self._parts.values())
        if not isinstance(self._sharding, NamedSharding):
            return parts[0]
        sharding = stack_sharding(self._sharding)
        return jax.make_array_from_single_device_arrays(self._shape, sharding, parts, dtype=self._dtype)


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(
    stack: Shaped[Array, "L *shape"], layer: Shaped[Array, "*shape"], index: Int[Array, ""] | int
) -> Shaped[Array, "L *shape"]:
    return jax.lax.dynamic_update_index_in_dim(stack, layer, index, 0)
