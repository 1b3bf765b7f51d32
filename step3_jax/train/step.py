"""One training step of the whole model: several kinds of rows, one loss, one update."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree, UInt8

from step3_jax.layers.attention import AttentionContext
from step3_jax.layers.embed import merge_image_features
from step3_jax.layers.rope import rope_table
from step3_jax.layers.rows import as_plain
from step3_jax.model.layers import layer_modules, over_layers
from step3_jax.model.step3 import Step3
from step3_jax.model.text import Decoder, DecoderLayer
from step3_jax.train.data import PREFIX, TokenRows
from step3_jax.train.loss import router_load, token_loss


class TrainState(NamedTuple):
    """All that changes from step to step.

    Attributes:
      params: Model parameters (and those of extra heads), float32.
      optimizer: The optimiser's state.
      step: Steps done.
    """

    params: PyTree
    optimizer: PyTree
    step: Int[Array, ""]


class Guide(NamedTuple):
    """Where some heads should look; the same heads of layers in a row.

    Attributes:
      sources: Place that each token should look at, int32 [B, T]; -1 for none.
      heads: Layer and head of those that should look there.
      previous: Layer and head of those that should look at the token before.
    """

    sources: Int[Array, "B T"]
    heads: tuple[tuple[int, int], ...]
    previous: tuple[tuple[int, int], ...]


class RowLoss(NamedTuple):
    """What a forward pass over rows gives.

    Attributes:
      total: Weighted sum of token losses in nats.
      weight: Sum of the weights.
      correct: Weighted sum of tokens whose most probable prediction is right.
      balance: Mean router balance loss of the mixture layers.
      shares: Share of pairs of each expert, [mixture layers, E].
      guide: Mean negative log of the attention that guided heads pay where they should look; 0 without a guide.
    """

    total: Float[Array, ""]
    weight: Float[Array, ""]
    correct: Float[Array, ""]
    balance: Float[Array, ""]
    shares: Float[Array, "layers E"]
    guide: Float[Array, ""]


def packed_context(decoder: Decoder, rows: TokenRows) -> AttentionContext:
    """Causal attention within each sequence of a packed row, and to the row's prefix if it has one."""
    config = decoder.config
    cos, sin = rope_table(rows.positions, head_dim=config.head_dim, theta=config.rope_theta)
    order = jnp.arange(rows.ids.shape[1])
    same = (rows.segments[:, :, None] == rows.segments[:, None, :]) | (rows.segments[:, None, :] == PREFIX)
    mask = same & (order[None, :] <= order[:, None])
    return AttentionContext(cos, sin, mask)


def row_loss(
    model: Step3,
    rows: TokenRows,
    features: Float[Array, "M D"] | None = None,
    *,
    num_scored: int | None = None,
    guide: Guide | None = None,
) -> RowLoss:
    """Next-token loss over packed rows.

    Args:
      model: The model.
      rows: Token rows.
      features: Image features that `rows.image_rows` points into; None for text.
      num_scored: At most so many tokens of a row have a weight; logits are computed for that many only, which
        saves most of the head's cost where only short answers are learnt. None for all.
      guide: Where some heads should look.
    """
    decoder = model.text
    hidden = decoder.embed_tokens(rows.ids)
    if features is not None:
        hidden = merge_image_features(hidden, features, rows.image_rows)
    context = packed_context(decoder, rows)
    loads, strays = [], []
    for index, layer in enumerate(decoder.layers):
        if guide is not None:
            strays += guide_losses(layer, index, hidden, context, rows, guide)
        hidden, _, found = over_layers([layer], hidden, context, observe=router_load)
        loads += found
    hidden, targets, weights = as_plain(decoder.norm(hidden)), rows.targets, rows.weights
    if num_scored is not None:
        _, picked = jax.lax.top_k(weights, num_scored)
        hidden = jnp.take_along_axis(hidden, picked[..., None], axis=1)
        targets = jnp.take_along_axis(targets, picked, axis=1)
        weights = jnp.take_along_axis(weights, picked, axis=1)
    logits = decoder.logits(hidden).reshape(-1, decoder.config.vocab_size)
    targets, weights = targets.reshape(-1), weights.reshape(-1)
    return RowLoss(
        total=jnp.sum(token_loss(logits, targets) * weights),
        weight=jnp.sum(weights),
        correct=jnp.sum((jnp.argmax(logits, axis=1) == targets) * weights),
        balance=jnp.mean(jnp.concatenate([load.loss for load in loads])) if loads else jnp.zeros(()),
        shares=jnp.concatenate([load.shares for load in loads]) if loads else jnp.zeros((0, 1)),
        guide=sum(strays) / len(strays) if strays else jnp.zeros(()),
    )


def guide_losses(
    layer: DecoderLayer,
    index: int,
    hidden: Float[Array, "B T D"],
    context: AttentionContext,
    rows: TokenRows,
    guide: Guide,
) -> list[Float[Array, ""]]:
    """For each guided head of a layer the mean negative log of its attention to where it should look."""
    told = [(head, guide.sources) for at, head in guide.heads if at == index]
    told += [(head, previous_places(rows)) for at, head in guide.previous if at == index]
    if not told:
        return []
    heads = [head for head, _ in told]
    scores = layer.attention.self_attn.scores(layer.attention.input_layernorm(hidden), context, heads)
    logs = jax.nn.log_softmax(scores, axis=-1)
    losses = []
    for number, (_, places) in enumerate(told):
        is_told = places >= 0
        picked = jnp.take_along_axis(logs[:, :, number], jnp.maximum(places, 0)[..., None], axis=2)[..., 0]
        losses.append(-jnp.sum(jnp.where(is_told, picked, 0)) / jnp.maximum(jnp.sum(is_told), 1))
    return losses


def previous_places(rows: TokenRows) -> Int[Array, "B T"]:
    """The place before each token in its own sequence; -1 for first tokens and padding."""
    order = jnp.arange(rows.ids.shape[1])[None]
    same = jnp.pad(rows.segments[:, 1:] == rows.segments[:, :-1], ((0, 0), (1, 0)))
    return jnp.where(same & (rows.segments != 0), order - 1, -1)


def normalise_pixels(
    pixels: UInt8[Array, "B S S 3"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "B 3 S S"]:
    """Bytes to what the vision tower takes: (x / 255 - mean) / std, channels first."""
    scaled = (pixels.astype(jnp.float32) / 255 - jnp.array(mean)) / jnp.array(std)
    return scaled.transpose(0, 3, 1, 2)


def is_block_matrix(path: tuple[object, ...], leaf: Array | jax.ShapeDtypeStruct) -> bool:
    """Whether a parameter is a matrix of a layer: not an embedding, a position table, a head or a convolution."""
    names = {str(getattr(key, "key", key)) for key in path}
    outside = {
        "embed_tokens",
        "lm_head",
        "embeddings",
        "vit_downsampler",
        "vit_downsampler2",
        "heads",
        "router",
    }
    return leaf.ndim in (2, 3) and not names & outside


def apply_gradients(
    state: TrainState, gradients: PyTree, optimizer: optax.GradientTransformation, rate: Float[Array, ""]
) -> TrainState:
    """One update of `state` at learning rate `rate`."""
    updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
    params = jax.tree.map(lambda param, update: param - rate * update, state.params, updates)
    return TrainState(params, optimizer_state, state.step + 1)


def prepare_for_training(model: Step3, *, capacity_factor: float, branch_gain: float) -> None:
    """Sets what training needs and inference does not.

    Args:
      model: A model with fresh weights; changed in place.
      capacity_factor: Of the experts, see `Experts`.
      branch_gain: First weight of the tower's norms. The released tower norms each branch after it and nothing
        before, so that every branch enters at full size; a small gain keeps the first steps calm.
    """
    set_capacity(model, capacity_factor)
    if model.vision is not None:
        for layer in model.vision.layers:
            for norm in (layer.layer_norm1, layer.layer_norm2):
                norm.weight.set_value(jnp.full_like(norm.weight.get_value(), branch_gain))


def set_capacity(model: Step3, capacity_factor: float | None) -> None:
    """Sets the capacity factor of all mixture layers; None drops no token."""
    for layer in layer_modules(model.text.layers):
        if layer.ffn.moe is not None:
            layer.ffn.moe.capacity_factor = capacity_factor


def split_model(model: Step3) -> tuple[nnx.GraphDef, PyTree]:
    """The module's static part, and its parameters as a plain tree."""
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)
