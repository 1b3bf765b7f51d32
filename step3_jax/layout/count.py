"""Parameters, bytes and operations of a model's parts, from the one table of its tensors and the one of their sharding."""

from __future__ import annotations

import math
from typing import NamedTuple

from step3_jax.config import ModelConfig, QuantConfig, TextConfig
from step3_jax.layout.role import Role
from step3_jax.layout.table import shard_shape
from step3_jax.layout.tensor import Row, list_rows, symbol_sizes
from step3_jax.layout.weight_form import form_bytes

# Parts of the weights.
ATTENTION_WEIGHTS = "attention"
NORMS, ROUTERS = "norms", "routers"
EMBEDDING, HEAD = "embedding", "head"
VISION, PROJECTOR = "vision tower", "projector"
DENSE, SHARED_EXPERTS, ROUTED_EXPERTS = "dense layers", "shared experts", "routed experts"
# Products of queries with keys, and of their weights with values; no weights.
CORE_ATTENTION = "core attention"
# A word of each path -> part, the first that matches; anything else is a norm.
_PART_OF_WORD = {
    "vision": VISION,
    "projector": PROJECTOR,
    "embed_tokens": EMBEDDING,
    "lm_head": HEAD,
    "router": ROUTERS,
    "inter_norm": NORMS,
    "self_attn": ATTENTION_WEIGHTS,
    "moe": ROUTED_EXPERTS,
    "share_expert": SHARED_EXPERTS,
    "mlp": DENSE,
}
# Part -> line of a list of bytes, in the list's order.
_LINES = {
    ATTENTION_WEIGHTS: "attention",
    NORMS: "norms and routers",
    ROUTERS: "norms and routers",
    EMBEDDING: "embedding and head",
    HEAD: "embedding and head",
    VISION: "vision tower and projector",
    PROJECTOR: "vision tower and projector",
    DENSE: "dense layers",
    SHARED_EXPERTS: "shared experts",
    ROUTED_EXPERTS: "routed experts",
}


class ParameterCount(NamedTuple):
    """Numbers of parameters; `total` is the sum of the others."""

    text: int
    vision: int
    projector: int
    total: int


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Parameters of the three models in one; the released one has 320,969,912,832."""
    parts = count_parts(config)
    vision, projector = parts.pop(VISION, 0), parts.pop(PROJECTOR, 0)
    text = sum(parts.values())
    return ParameterCount(text, vision, projector, text + vision + projector)


def count_parts(config: ModelConfig) -> dict[str, int]:
    """Parameters by part of the model, all layers together."""
    symbols = symbol_sizes(config)
    parts: dict[str, int] = {}
    for row, layers in list_rows(config):
        part = _part(row)
        parts[part] = parts.get(part, 0) + len(layers) * math.prod(row.sizes(symbols))
    return parts


def weight_bytes(config: ModelConfig, weights: str, role: Role) -> dict[str, int]:
    """Bytes on one device of a role, by part of the model; related parts are merged.

    Args:
      config: From `role.deployed_config`.
      weights: One of `weight_form.WEIGHTS`.
      role: One of `role.roles_of`.
    """
    symbols = symbol_sizes(config)
    parts = dict.fromkeys(_LINES.values(), 0)
    for row, layers in list_rows(config):
        path = row.ours.split(".")
        if role.holds(path):
            shape = shard_shape(row.sizes(symbols), path, role.parallel_of(path), config.vision)
            parts[_LINES[_part(row)]] += len(layers) * _tensor_bytes(config, weights, row, shape)
    return {part: size for part, size in parts.items() if size}


def active_parameters(config: TextConfig, num_tokens: int = 1) -> tuple[int, int]:
    """Weights of the layers and the head that a step of `num_tokens` tokens uses.

    For several tokens, the number of chosen experts is the expectation if all are equally likely: E (1 - (1 - k/E)^n).
    """
    parts = _multiplied(config, num_tokens)
    head = parts.pop(HEAD)
    return round(sum(parts.values())), round(head)


def prefill_flops(config: TextConfig, length: int) -> int:
    """Operations of prefilling a prompt: 2 per weight and token, the head once, and causal attention."""
    layers, head = active_parameters(config)
    attention = 2 * length**2 * config.query_size * config.num_hidden_layers
    return 2 * layers * length + 2 * head + attention


def decode_flops(config: TextConfig, context_tokens: int) -> dict[str, int]:
    """Operations of generating one token, by part: 2 per weight, and 4 per head column and token of context.

    Args:
      config: The decoder's sizes.
      context_tokens: Tokens in the cache that the token attends to.
    """
    flops = {part: round(2 * number) for part, number in _multiplied(config, 1).items()}
    return flops | {CORE_ATTENTION: 4 * config.query_size * config.num_hidden_layers * context_tokens}


def _multiplied(config: TextConfig, num_tokens: int) -> dict[str, float]:
    """Weights of each part that a step uses in products: no norms, no rows of the embedding."""
    parts = count_parts(ModelConfig(text=config, vision=None, image_token_id=0))
    multiplied: dict[str, float] = {part: size for part, size in parts.items() if part not in (NORMS, EMBEDDING)}
    if ROUTED_EXPERTS in multiplied:
        multiplied[ROUTED_EXPERTS] *= 1 - (1 - config.moe_top_k / config.moe_num_experts) ** num_tokens
    return multiplied


def _part(row: Row) -> str:
    words = row.ours.split(".")
    return next((part for word, part in _PART_OF_WORD.items() if word in words), NORMS)


def _tensor_bytes(config: ModelConfig, weights: str, row: Row, shape: tuple[int, ...]) -> int:
    """Bytes of a device's part of a tensor; what the FP8 release keeps in bfloat16 stays so in all quantised forms."""
    if weights == "float32" or not row.is_fp8:
        return form_bytes(shape, weights if weights == "float32" else "bfloat16")
    quantization = config.quantization or QuantConfig()
    return form_bytes(shape, weights, quantization.weight_block_size)
