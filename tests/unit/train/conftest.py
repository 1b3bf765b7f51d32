"""A model small enough to train in a test."""

from __future__ import annotations

import jax.numpy as jnp
import pytest
from flax import nnx
from jaxtyping import PyTree

from step3_jax.config import ModelConfig
from step3_jax.model.step3 import Step3
from step3_jax.train.step import split_model
from tests.small import small_text


@pytest.fixture(scope="session")
def text_parts() -> tuple[nnx.GraphDef, PyTree]:
    """One mixture layer, split: made once, under `jit`, as its weights one by one take seconds."""
    text = small_text(num_hidden_layers=1, moe_layers=(0,), vocab_size=40, max_position_embeddings=64)
    config = ModelConfig(text=text, vision=None, dtype="float32", image_token_id=39, eos_token_id=1)
    return split_model(nnx.jit(lambda: Step3(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))())


@pytest.fixture
def text_model(text_parts: tuple[nnx.GraphDef, PyTree]) -> Step3:
    """A separate copy, so that a test may change it."""
    return nnx.merge(*text_parts)
