"""A model for `jax.shard_map`: the same modules, with sharded ones wrapped in their exchanges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from step3_jax.layers.collective import Group, ShardedEmbedding, ShardedHead, ShardedOutput, SummedLinear
from step3_jax.layers.expert_exchange import ShardedExperts, gather_tokens
from step3_jax.layers.router import Routing
from step3_jax.layers.rows import Rows
from step3_jax.layout.table import AXES, view_shape
from step3_jax.layout.tensor import Path
from step3_jax.mesh import Layout, padded_shape
from step3_jax.model.layers import is_stacked, layer_modules, stack_sharding
from step3_jax.model.step3 import Step3
from step3_jax.model.text import FfnBlock
from step3_jax.model.vision import Projector, VisionTower


class ShardedFfn(nnx.Module):
    """FFN half of a layer; `inner` holds this device's part of it."""

    def __init__(self, inner: FfnBlock, layout: Layout, num_experts: int) -> None:
        self.tensor = find_group(layout, "width")
        everyone = find_group(layout, "experts", "expert_width")
        self.mlp = inner.mlp
        self.share_expert = inner.share_expert
        self.moe = (
            ShardedExperts(
                inner.moe,
                everyone,
                expert_axes=layout.axes("experts"),
                width=find_group(layout, "expert_width"),
                num_experts=num_experts,
                use_all_to_all=layout.parallel.exchange == "all_to_all",
            )
            if inner.moe is not None
            else None
        )
        # If routed and shared experts are sharded over the same devices, one exchange serves both.
        self.is_joint = self.tensor == everyone and not (self.moe is not None and self.moe.use_all_to_all)

    def __call__(self, normed: Float[Array, "N D"] | Rows, routing: Routing | None) -> Float[Array, "N D"]:
        """See `FfnBlock`; tokens are this device's own."""
        if self.mlp is not None:
            with jax.named_scope("mlp"):
                return self.tensor.reduce(self.mlp(self.tensor.gather_rows(normed)))
        if self.is_joint:
            tokens = gather_tokens(self.tensor, normed, routing.weights, routing.experts)
            with jax.named_scope("moe"):
                routed = self.moe.sum_part(*tokens)
            with jax.named_scope("share_expert"):
                return self.tensor.reduce(routed + self.share_expert(tokens[0]))
        with jax.named_scope("moe"):
            routed = self.moe(normed, routing)
        with jax.named_scope("share_expert"):
            shared = self.tensor.reduce(self.share_expert(self.tensor.gather_rows(normed)))
        return routed + shared


def parallelise(model: Step3, layout: Layout) -> Step3:
    """The model as one device runs it inside `jax.shard_map`.

    Args:
      model: A model whose weights are placed as `layout.parameter` says, or abstract. It is not changed; the weights are
        shared.
      layout: The devices.
    """
    model = nnx.merge(*nnx.split(model))
    config = model.config.text
    tensor = find_group(layout, "width")
    decoder = model.text
    decoder.embed_tokens = ShardedEmbedding(decoder.embed_tokens, tensor)  # type: ignore[assignment]
    decoder.lm_head = ShardedHead(decoder.lm_head, tensor, config.vocab_size)  # type: ignore[assignment]
    for layer in layer_modules(decoder.layers):
        attention = layer.attention.self_attn
        attention.o_proj = ShardedOutput(attention.o_proj, tensor)  # type: ignore[assignment]
        attention.num_heads //= layout.size("heads")
        layer.ffn = ShardedFfn(layer.ffn, layout, config.moe_num_experts)  # type: ignore[assignment]
    if model.vision is not None and model.projector is not None:
        parallelise_vision(model.vision, model.projector, layout)
    return model


def parallelise_vision(vision: VisionTower, projector: Projector, layout: Layout) -> None:
    """Turns tower and projector into those of one device inside `jax.shard_map`, in place.

    The first of each pair of products (q, k and v, `fc1`, the second convolution) has some heads or columns on
    each device and exchanges nothing; one sum after the second product makes all devices of a group equal again.
    """
    heads, width = (find_group(layout, name, tokens="images") for name in ("vision_heads", "vision_width"))
    for layer in vision.layers:
        layer.self_attn.out_proj = SummedLinear(layer.self_attn.out_proj, heads)  # type: ignore[assignment]
        layer.mlp.fc2 = SummedLinear(layer.mlp.fc2, width)  # type: ignore[assignment]
    projector.vit_large_projector = SummedLinear(projector.vit_large_projector, width)  # type: ignore[assignment]


def find_group(layout: Layout, *logical: str, tokens: str = "rows") -> Group:
    """The devices along some logical axes, in the order of the mesh.

    Args:
      layout: The devices.
      logical: Axes of weights.
      tokens: The logical axis of the input.
    """
    wanted = {axis for name in logical for axis in layout.axes(name)}
    rows = layout.axes(tokens)
    return Group(
        split=tuple(axis for axis in AXES if axis in wanted and axis in rows),
        copies=tuple(axis for axis in AXES if axis in wanted and axis not in rows),
    )


@runtime_checkable
class Places(Protocol):
    """Anything that knows the placement of parameters: a layout, or the devices of several roles."""

    def parameter(self, path: Path) -> NamedSharding:
        """The sharding of the parameter at `path`, in the shape of `sharding.view_shape`."""


def place_model(model: Step3, places: Places) -> Step3:
    """A copy of a model in memory on its devices; head and vision tower are padded with zeros where they do not divide.

    Every process has the same model. From a checkpoint, `load_model(..., layout=...)` never holds all of it.
    """

    def place(path: Path, leaf: Array, sharding: NamedSharding) -> Array:
        view = view_shape(leaf.shape, path, len(sharding.spec), model.config.vision)
        shape = padded_shape(view, sharding)
        if not sharding.addressable_devices:
            # `make_array_from_callback` would request all of a replicated array from every device.
            return jax.make_array_from_single_device_arrays(shape, sharding, [], dtype=leaf.dtype)
        host = np.pad(np.asarray(leaf).reshape(view), [(0, new - old) for new, old in zip(shape, view, strict=True)])
        return jax.make_array_from_callback(shape, sharding, host.__getitem__)

    return _map_parameters(model, places, place)


def place_shapes(model: Step3, places: Places) -> Step3:
    """The same for an abstract model from `nnx.eval_shape`: shapes with shardings, to compile for."""

    def place(path: Path, leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        view = view_shape(leaf.shape, path, len(sharding.spec), model.config.vision)
        return jax.ShapeDtypeStruct(padded_shape(view, sharding), leaf.dtype, sharding=sharding)

    return _map_parameters(model, places, place)


def _map_parameters(model: Step3, places: Places, place: Callable[..., object]) -> Step3:
    """A module like `model`, with each array (FP8 weights have two) placed where its parameter belongs."""
    graphdef, state = nnx.split(model)
    placed = []
    for path, variable in nnx.to_flat_state(state):
        sharding = places.parameter(path)
        if is_stacked(path):
            sharding = stack_sharding(sharding)
        leaves, treedef = jax.tree.flatten(variable.get_value())
        leaves = [place(path, leaf, sharding) for leaf in leaves]
        # New variables: those of `state` belong to the model.
        placed.append((path, variable.replace(jax.tree.unflatten(treedef, leaves))))
    return nnx.merge(graphdef, nnx.from_flat_state(placed))
