"""The two roles' steps: pure functions around the modules of the fused model.

What a layer's attention half passes on crosses to the FFN side as rows of bytes (`payload`), and what comes back is
added to the residual stream by the next attention step. All of them run on each device's own tokens, inside
`jax.shard_map` over the mesh of their role; an executor decides when, where and how rows cross.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels.pages import KVPages
from step3_jax.afd.payload import PayloadFormat
from step3_jax.config import TextConfig
from step3_jax.layers.attention import AttentionContext, CacheStep, at_layer, attention_context
from step3_jax.layers.embed import Embedding, merge_image_features
from step3_jax.layers.linear import Linear
from step3_jax.layers.norm import RMSNorm
from step3_jax.layers.router import Routing
from step3_jax.layers.rows import Rows, as_plain
from step3_jax.mesh import Layout
from step3_jax.model.layers import LayerStack, layer_at, layer_modules
from step3_jax.model.parallel import ShardedFfn, parallelise_vision
from step3_jax.model.step3 import Step3
from step3_jax.model.text import AttentionBlock, FfnBlock
from step3_jax.model.vision import Projector, VisionTower

M = TypeVar("M", bound=nnx.Module)


class Tokens(NamedTuple):
    """Tokens of one step between two layers, on the attention side.

    Attributes:
      hidden: The residual stream, without the output of the last FFN half.
      returned: That output as it came back: one row per token, or one part of the sum per FFN device, grouped by
        device.
      context: Shared by all layers of the step.
    """

    hidden: Float[Array, "B T D"]
    returned: UInt8[Array, "rows output_bytes"]
    context: AttentionContext


@dataclasses.dataclass(frozen=True)
class Skeleton(Generic[M]):
    """A module without its arrays, which are arguments: one compiled program serves all layers of the same structure."""

    graphdef: nnx.GraphDef[M]
    treedef: jax.tree_util.PyTreeDef

    def build(self, leaves: Sequence[Array]) -> M:
        """The module with these arrays."""
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, leaves))


class Ends(nnx.Module):
    """The parts of the decoder before the first layer and after the last one, on the attention side."""

    def __init__(self, embed_tokens: Embedding, norm: RMSNorm, lm_head: Linear) -> None:
        self.embed_tokens = embed_tokens
        self.norm = norm
        self.lm_head = lm_head


@dataclasses.dataclass(frozen=True)
class Part(Generic[M]):
    """A module taken apart: skeleton and arrays.

    Attributes:
      skeleton: The module without arrays.
      leaves: The arrays.
      stacked_layers: How many layers are stacked in the arrays; None for a single layer's.
    """

    skeleton: Skeleton[M]
    leaves: list[Array]
    stacked_layers: int | None = None

    @property
    def num_layers(self) -> int:
        """The number of layers."""
        return 1 if self.stacked_layers is None else self.stacked_layers

    def build(self, leaves: Sequence[Array], index: Int[Array, ""] | int = 0) -> M:
        """The module of one layer.

        Args:
          leaves: Arrays like the part's own.
          index: Which layer of the stack; may be traced.
        """
        module = self.skeleton.build(leaves)
        return module if self.stacked_layers is None else layer_at(module, index)


@dataclasses.dataclass(frozen=True)
class Parts:
    """A model taken apart by role. Layers of the same structure share one skeleton.

    Attributes:
      ends: Embedding, last norm and head.
      attention: Attention half of each layer, or stack of layers.
      ffn: FFN half of each layer, or stack of layers.
    """

    ends: Part[Ends]
    attention: list[Part[AttentionBlock]]
    ffn: list[Part[FfnBlock]]


def take_apart(model: Step3) -> Parts:
    """Takes a model's decoder apart; the arrays stay where they are."""
    decoder = model.text
    counts = [layer.count if isinstance(layer, LayerStack) else None for layer in decoder.layers]
    layers = list(zip(layer_modules(decoder.layers), counts, strict=True))
    return Parts(
        ends=split_module(Ends(decoder.embed_tokens, decoder.norm, decoder.lm_head)),
        attention=_share_skeletons([split_module(layer.attention, count) for layer, count in layers]),
        ffn=_share_skeletons([split_module(layer.ffn, count) for layer, count in layers]),
    )


def split_module(module: M, stacked_layers: int | None = None) -> Part[M]:
    """Skeleton and arrays of a module, or of one that holds stacks of layers."""
    graphdef, state = nnx.split(module)
    leaves, treedef = jax.tree.flatten(state)
    return Part(Skeleton(graphdef, treedef), leaves, stacked_layers)


class Vision:
    """Vision tower and projector on the attention side.

    Attributes:
      leaves: Their arrays, as `AfdTopology.tower` places them.
    """

    def __init__(self, model: Step3, layout: Layout) -> None:
        """Takes them from a model; empty if it is text-only."""
        self._layout = layout
        self._part: Part[nnx.List] | None = None
        if model.vision is not None and model.projector is not None:
            # Copies of the modules, not of their arrays.
            vision, projector = (nnx.merge(*nnx.split(module)) for module in (model.vision, model.projector))
            parallelise_vision(cast(VisionTower, vision), cast(Projector, projector), layout)
            self._part = split_module(nnx.List([vision, projector]))
        self.leaves: list[Array] = [] if self._part is None else self._part.leaves

    def encode(self, leaves: Sequence[Array], pixels: Float[Array, "images 3 S S"]) -> Float[Array, "images tokens D"]:
        """Features of squares, equally many for each of the layout's "images"; to be traced.

        Args:
          leaves: In the order of `leaves`, of any dtype.
          pixels: The squares.

        Raises:
          ValueError: If the model has no vision tower.
        """
        if self._part is None:
            raise ValueError("this is a text-only model: its checkpoint has no vision tower, so it takes no images")
        images = self._layout.spec("images")
        specs = [leaf.sharding.spec for leaf in self.leaves]  # type: ignore[attr-defined]
        return jax.shard_map(
            functools.partial(self._encode_own, self._part.skeleton),
            mesh=self._layout.mesh,
            in_specs=(specs, images),
            out_specs=images,
            check_vma=False,
        )(list(leaves), pixels)

    @staticmethod
    def _encode_own(skeleton: Skeleton[nnx.List], leaves: list[Array], pixels: Array) -> Array:
        vision, projector = skeleton.build(leaves)
        with jax.named_scope("vision"):
            return projector(vision(pixels))


def arrays_by_role(model: Step3) -> dict[str, list[Array]]:
    """All arrays of a model by the role that needs them, "attention" or "ffn"; for tests and reports."""
    found: dict[str, list[Array]] = {"attention": [], "ffn": []}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        found["ffn" if "ffn" in path else "attention"] += jax.tree.leaves(variable.get_value())
    return found


def begin_step(
    ends: Ends,
    config: TextConfig,
    form: PayloadFormat,
    token_ids: Int[Array, "B T"],
    step: CacheStep,
    page_size: int,
    features: Float[Array, "M D"] | None = None,
    feature_rows: Int[Array, "B T"] | None = None,
) -> Tokens:
    """Embeds tokens.

    Args:
      ends: For the embedding.
      config: Head size and rotary base.
      form: Of the rows that come back.
      token_ids: [B, T] in a decode step, [1, N] for a chunk of prompts.
      step: Where the tokens stand in the cache.
      page_size: Tokens of a page.
      features: Image features; None without images.
      feature_rows: Row of `features` for each token, -1 for none; None without images.
    """
    hidden = ends.embed_tokens(token_ids).astype(ends.norm.weight[...].dtype)
    if features is not None and feature_rows is not None:
        hidden = merge_image_features(hidden, features, feature_rows)
    context = attention_context(config, (token_ids.shape[0], token_ids.shape[1]), step=step, page_size=page_size)
    return Tokens(hidden, jnp.zeros((token_ids.size, form.output_bytes), jnp.uint8), context)


def attention_step(
    block: AttentionBlock,
    form: PayloadFormat,
    tokens: Tokens,
    pages: KVPages,
    layer: Int[Array, ""] | int,
    layer_pages: int,
) -> tuple[Float[Array, "B T D"], UInt8[Array, "N row_bytes"], KVPages]:
    """Attention half of a layer.

    Args:
      block: The layer's block.
      form: The format of the rows in both directions.
      tokens: The previous layer's result.
      pages: The pool of all layers.
      layer: This layer's number.
      layer_pages: Pages per layer in the pool.

    Returns:
      The residual stream (it stays), rows for the FFN side, and the pool with the new rows.
    """
    context = at_layer(tokens.context, layer, layer_pages)
    out = block(add_returned(form, tokens.hidden, tokens.returned), context, pages)
    routing = out.routing
    rows = form.pack(out.normed) if routing is None else form.pack(out.normed, routing.experts, routing.weights)
    return out.residual, rows, cast(KVPages, out.pages)


def ffn_step(
    block: FfnBlock,
    layout: Layout,
    num_experts: int,
    form: PayloadFormat,
    rows: UInt8[Array, "N row_bytes"],
    dtype: jax.typing.DTypeLike,
) -> UInt8[Array, "N output_bytes"]:
    """FFN half of a layer.

    Args:
      block: This device's part of the layer's.
      layout: The FFN devices.
      num_experts: Experts of the whole layer.
      form: The format of the rows in both directions.
      rows: Tokens that arrived at this device.
      dtype: The dtype to compute in.

    Returns:
      The layer's output for these tokens.
    """
    normed, experts, weights = unpack_tokens(block, form, rows, dtype)
    routing = None
    if block.moe is not None:
        # The router's logits stay on the attention side; nothing here needs them.
        routing = Routing(weights, experts, jnp.zeros((rows.shape[0], num_experts), jnp.float32))
    return form.pack_output(ShardedFfn(block, layout, num_experts)(normed, routing))


def unpack_tokens(
    block: FfnBlock, form: PayloadFormat, rows: UInt8[Array, "N row_bytes"], dtype: jax.typing.DTypeLike
) -> tuple[Float[Array, "N D"] | Rows, Int[Array, "N top_k"], Float[Array, "N top_k"]]:
    """Tokens, expert ids and mixing weights for an FFN half: in FP8 if sent so and its matrix products take it."""
    products = [part for part in (block.mlp, block.moe, block.share_expert) if part is not None]
    if form.payload == "fp8" and all(part.takes_rows for part in products):
        return form.unpack_rows(rows, dtype)
    return form.unpack(rows, dtype)


def end_step(ends: Ends, form: PayloadFormat, tokens: Tokens) -> Float[Array, "B T V"]:
    """Float32 logits after the last layer."""
    return token_logits(ends, add_returned(form, tokens.hidden, tokens.returned))


def token_logits(ends: Ends, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """The same of the residual stream after the last layer, with what came back of it."""
    normed = as_plain(ends.norm(hidden))
    with jax.named_scope("lm_head"):
        return ends.lm_head(normed).astype(jnp.float32)


def add_returned(
    form: PayloadFormat, hidden: Float[Array, "B T D"], returned: UInt8[Array, "rows output_bytes"]
) -> Float[Array, "B T D"]:
    """The residual stream plus what came back, see `Tokens`."""
    parts = form.unpack_output(returned, hidden.dtype).reshape(-1, *hidden.shape)
    return hidden + jnp.sum(parts, axis=0)


def _share_skeletons(parts: list[Part[M]]) -> list[Part[M]]:
    """Makes equal skeletons one object, so that comparing them is quick."""
    kinds: list[Skeleton[M]] = []
    shared = []
    for part in parts:
        kind = next((kind for kind in kinds if kind == part.skeleton), part.skeleton)
        if kind is part.skeleton:
            kinds.append(kind)
        shared.append(dataclasses.replace(part, skeleton=kind))
    return shared
