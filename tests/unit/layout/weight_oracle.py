"""Bytes of weights that one device holds, from the sizes of the model alone.

The rules of the tables in `step3_jax/layout/`, restated as sums that use neither: both must come out the
same.
"""

from __future__ import annotations

from step3_jax.config import ModelConfig, TextConfig
from step3_jax.layout.parallel import ATTENTION, FFN
from step3_jax.layout.role import Role

_DENSE_BYTES = {"float32": 4, "bfloat16": 2, "fp8": 2}


def weight_bytes(config: ModelConfig, weights: str, role: Role) -> dict[str, int]:
    """Bytes on one device of a role, by part of the model.

    Args:
      config: As `deployed_config` gives it.
      weights: "float32", "bfloat16" or "fp8".
      role: One of `roles_of`.
    """
    text, tp = config.text, role.parallel.tp
    itemsize = _DENSE_BYTES[weights]
    block = config.quantization.weight_block_size if config.quantization is not None else None
    parts: dict[str, int] = {}
    if role.name != FFN:
        parts |= _attention_bytes(text, itemsize, block, tp)
        # Columns of the table; rows of the head, filled up where they do not divide.
        table, head = text.vocab_size * (text.hidden_size // tp), -(-text.vocab_size // tp) * text.hidden_size
        parts["embedding and head"] = itemsize * (table + head)
        if config.vision is not None:
            parts["vision tower and projector"] = itemsize * count_vision_parameters(config, role.num_tower_shards)
    if role.name != ATTENTION:
        num_moe = len(text.moe_layers)
        num_dense = text.num_hidden_layers - num_moe
        width = role.num_devices // role.parallel.expert_groups
        parts["dense layers"] = num_dense * _swiglu_bytes(text, text.intermediate_size // tp, itemsize, block)
        parts["shared experts"] = num_moe * _swiglu_bytes(text, text.share_expert_dim // tp, itemsize, block)
        expert = _swiglu_bytes(text, text.moe_intermediate_size // width, itemsize, block)
        parts["routed experts"] = num_moe * (text.moe_num_experts // role.parallel.expert_groups) * expert
    return {name: size for name, size in parts.items() if size}


def count_vision_parameters(config: ModelConfig, shards: int = 1) -> int:
    """Parameters of the tower and the projector on each device that holds a shard; 0 without them.

    Whole heads, columns of the MLPs, and channels between the last two products are cut, and filled up to equal shards.
    """
    vision = config.vision
    if vision is None:
        return 0
    width, inner, out = vision.hidden_size, vision.intermediate_size, vision.output_hidden_size
    embeddings = width * (vision.num_channels * vision.patch_size**2 + 1) + width * (2 + vision.grid**2)
    heads = -(-vision.num_attention_heads // shards) * vision.head_dim
    inner, channels = -(-inner // shards), -(-2 * out // shards)
    attention = 4 * width * heads + 3 * heads + width
    mlp = 2 * width * inner + inner + width
    norms = 4 * width
    convolutions = 4 * width * out + out + 9 * out * channels + channels
    linear = channels * config.text.hidden_size + (config.text.hidden_size if config.projector_bias else 0)
    return embeddings + vision.num_hidden_layers * (attention + mlp + norms) + convolutions + linear


def _attention_bytes(text: TextConfig, itemsize: int, block: tuple[int, int] | None, tp: int) -> dict[str, int]:
    hidden, rank, queries = text.hidden_size, text.share_q_dim, text.query_size
    copied = ((rank, hidden), (text.head_dim, hidden), (text.head_dim, hidden), (queries, rank))
    one = sum(_matrix_bytes(*shape, itemsize, block) for shape in copied)
    one += _matrix_bytes(hidden, queries // tp, itemsize, block)
    norms = text.num_hidden_layers * (2 * hidden + rank) + hidden
    routers = len(text.moe_layers) * text.moe_num_experts * hidden
    return {"attention": text.num_hidden_layers * one, "norms and routers": itemsize * (norms + routers)}


def _swiglu_bytes(text: TextConfig, width: int, itemsize: int, block: tuple[int, int] | None) -> int:
    gate = _matrix_bytes(width, text.hidden_size, itemsize, block)
    return 2 * gate + _matrix_bytes(text.hidden_size, width, itemsize, block)


def _matrix_bytes(rows: int, columns: int, itemsize: int, block: tuple[int, int] | None) -> int:
    """A linear weight: in FP8 a byte a value and a float32 scale for each block."""
    if block is None:
        return rows * columns * itemsize
    return rows * columns + 4 * -(-rows // block[0]) * -(-columns // block[1])
