"""Stacked layers run like separate ones, and can be unstacked again."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from step3_jax.cache.paged import empty_cache
from step3_jax.checkpoint.names import is_fp8_tensor, parameters_of, released_name
from step3_jax.config import ModelConfig
from step3_jax.layers.attention import CacheStep
from step3_jax.model.arrangement import Arrangement, arrange, unstack
from step3_jax.model.layers import LayerStack, count_layers
from step3_jax.model.step3 import Step3, stack_model
from step3_jax.quant import dequantise, quantise
from step3_jax.stack import LayerOf, pick
from tests.small import small_text

# A dense layer, two with experts, a dense one; FP8 blocks need sizes of 128.
TEXT = small_text(
    num_hidden_layers=4,
    moe_layers=(1, 2),
    hidden_size=128,
    intermediate_size=128,
    moe_intermediate_size=128,
    share_expert_dim=128,
    share_q_dim=128,
    head_dim=64,
    max_position_embeddings=128,
)
CONFIG = ModelConfig(text=TEXT, vision=None, dtype="bfloat16", image_token_id=1, eos_token_id=0)


@pytest.fixture(scope="module")
def model() -> Step3:
    model = Step3(CONFIG, rngs=nnx.Rngs(0))
    for path, variable in parameters_of(model).items():
        if is_fp8_tensor(released_name(path)):
            variable.set_value(quantise(variable.get_value()))
    return model


def run(model: Step3) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Logits and cache of a decode step, and the experts of each MoE layer."""
    graphdef, state = nnx.split(model)

    # Otherwise XLA:CPU rounds to bfloat16 where its fusions end, and those differ in a loop.
    @functools.partial(jax.jit, compiler_options={"xla_allow_excess_precision": False})
    def call(state, ids, cache, step):
        text = nnx.merge(graphdef, state).text
        hidden, cache, chosen = text.run(
            text.embed_tokens(ids), cache=cache, step=step, observe=lambda routing: routing.experts
        )
        return text.logits(hidden), cache, chosen

    cache = empty_cache(TEXT, 4, "fp8", as_bits=True)
    table = jnp.asarray([[2], [1]], jnp.int32)
    # Two tokens of each sequence, after others that are zeros.
    step = CacheStep(table, jnp.asarray([6, 4], jnp.int32))
    logits, cache, chosen = call(state, jnp.asarray([[7, 1], [9, 2]]), cache, step)
    experts = np.concatenate([np.asarray(one) for one in chosen])
    return [np.asarray(logits)], [np.asarray(leaf) for leaf in jax.tree.leaves(cache)], [experts]


def test_a_loop_over_stacks_gives_the_bits_of_separate_layers(model: Step3) -> None:
    stacked = stack_model(model)
    assert [part.count for part in stacked.text.layers] == [1, 2, 1]
    for found, expected in zip(run(stacked), run(model), strict=True):
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)


def test_what_is_arranged_comes_apart_as_it_was(model: Step3) -> None:
    arranged = arrange(model, Arrangement(stacks=True, fuses=True, quantises=True))
    assert all(isinstance(part, LayerStack) for part in arranged.text.layers)
    assert arranged.text.layers[1].stacked.ffn.share_expert.gate_up_proj is not None
    again = unstack(arranged)
    # Of the stacks themselves nothing is copied.
    weight = again.text.layers[2].ffn.moe.up_proj.get_value()
    assert isinstance(weight, LayerOf)
    assert weight.stack.values is arranged.text.layers[1].stacked.ffn.moe.up_proj.get_value().values
    expected = parameters_of(model)
    found = parameters_of(again)
    assert found.keys() == expected.keys()
    for path, variable in found.items():
        for one, other in zip(
            jax.tree.leaves(pick(variable.get_value())), jax.tree.leaves(expected[path].get_value()), strict=True
        ):
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_only_neighbours_of_one_form_make_a_stack(model: Step3) -> None:
    mixed = nnx.merge(*nnx.split(model))
    layer = mixed.text.layers[2].ffn.share_expert.up_proj
    layer.weight.set_value(dequantise(layer.weight.get_value(), jnp.bfloat16))
    stacked = stack_model(mixed)
    assert [part.count for part in stacked.text.layers] == [1, 1, 1, 1]
    assert count_layers(stacked.text.layers) == TEXT.num_hidden_layers
