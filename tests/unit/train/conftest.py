"""A model small enough to train in a test."""

from __future__ import annotations

import jax.numpy as jnp
import pytest
from flax import nnx
from jaxtyping import PyTree

from step3_jax.config import ModelConfig, TextConfig
from step3_jax.model.step3 import Step3
from step3_jax.train.step import split_model


@pytest.fixture(scope="session")
def text_parts() -> tuple[nnx.GraphDef, PyTree]:
    """One mixture layer, split: made once, under `jit`, as its weights one by one take seconds."""
    text = TextConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        head_dim=16,
        share_q_dim=16,
        moe_num_experts=4,
        moe_top_k=2,
        moe_intermediate_size=16,
        share_expert_dim=16,
        moe_layers=(0,),
        vocab_size=40,
        max_position_embeddings=64,
    )
    config = ModelConfig(text=text, vision=None, dtype="float32", image_token_id=39, eos_token_id=1)
    return split_model(nnx.jit(lambda: Step3(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))())


@pytest.fixture
def text_model(text_parts: tuple[nnx.GraphDef, PyTree]) -> Step3:
    """A copy of its own, so that a test may change it."""
    return nnx.merge(*text_parts)
