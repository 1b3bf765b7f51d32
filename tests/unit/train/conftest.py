"""A model small enough to train in a test."""

from __future__ import annotations

import jax.numpy as jnp
import pytest
from flax import nnx

from step3_jax.config import ModelConfig, TextConfig
from step3_jax.model.step3 import Step3


@pytest.fixture(scope="session")
def text_config() -> ModelConfig:
    text = TextConfig(
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
        vocab_size=40,
        max_position_embeddings=64,
    )
    return ModelConfig(text=text, vision=None, dtype="float32", image_token_id=39, eos_token_id=1)


@pytest.fixture
def text_model(text_config: ModelConfig) -> Step3:
    # Under `jit` the weights are one program; one by one they take seconds.
    return nnx.jit(lambda: Step3(text_config, dtype=jnp.float32, rngs=nnx.Rngs(0)))()
