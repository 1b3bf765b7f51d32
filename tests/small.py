"""A model as small as it gets."""

from __future__ import annotations

import dataclasses

from step3_jax.config import TextConfig

_TEXT = TextConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    head_dim=16,
    share_q_dim=16,
    moe_num_experts=4,
    moe_top_k=2,
    moe_intermediate_size=16,
    share_expert_dim=16,
    moe_layers=(1,),
    vocab_size=61,
    max_position_embeddings=256,
)


def small_text(**changes: object) -> TextConfig:
    """One dense layer and one with experts, with sizes replaced by `changes`."""
    return dataclasses.replace(_TEXT, **changes)  # type: ignore[arg-type]
