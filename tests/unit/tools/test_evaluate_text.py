"""Bits per byte and router load of the evaluation."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from step3_jax import resources
from step3_jax.config import ModelConfig, TextConfig
from step3_jax.model.step3 import Step3
from step3_jax.text.tokenizer import Tokenizer
from tools.tiny.evaluate_text import score_text

LINES = ["a dog barked", "the café is open — come in", "she sells sea shells", "he waited", "it rains"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(resources.find("models/step3-tiny"))


@pytest.fixture(scope="module")
def model() -> Step3:
    text = TextConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, head_dim=8, share_q_dim=8,
        moe_num_experts=4, moe_top_k=2, moe_intermediate_size=8, share_expert_dim=8, moe_layers=(1,), vocab_size=4096,
        max_position_embeddings=512,
    )  # fmt: skip
    config = ModelConfig(text=text, vision=None, image_token_id=4086)
    return nnx.jit(lambda: Step3(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))()


def test_bits_are_those_of_the_models_own_logits(model: Step3, tokenizer: Tokenizer) -> None:
    score = score_text(model, tokenizer, LINES)
    text = "".join(line + "\n" for line in LINES)
    ids = tokenizer.encode(text, add_bos=True)
    logits = np.asarray(nnx.jit(lambda model, ids: model(ids))(model, jnp.asarray([ids])), np.float64)[0, :-1]
    nats = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(ids) - 1), ids[1:]]
    assert score.num_bytes == len(text.encode())
    assert score.num_tokens == len(ids) - 1
    assert score.bits_per_byte == pytest.approx(nats.sum() / math.log(2) / len(text.encode()), rel=1e-4)


def test_each_chunk_of_eight_lines_starts_anew(model: Step3, tokenizer: Tokenizer) -> None:
    first, second = LINES + LINES[:3], LINES[::-1]
    both = score_text(model, tokenizer, first + second)
    parts = [score_text(model, tokenizer, part) for part in (first, second)]
    bits = sum(part.bits_per_byte * part.num_bytes for part in parts)
    assert both.num_bytes == sum(part.num_bytes for part in parts)
    assert both.bits_per_byte == pytest.approx(bits / both.num_bytes, rel=1e-5)


def test_shares_of_the_experts_sum_to_one_for_each_mixture_layer(model: Step3, tokenizer: Tokenizer) -> None:
    shares = score_text(model, tokenizer, LINES).shares
    assert shares.shape == (1, 4)
    np.testing.assert_allclose(shares.sum(axis=1), 1.0)


def test_nothing_to_score_is_an_error(model: Step3, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="no sentence"):
        score_text(model, tokenizer, [])
