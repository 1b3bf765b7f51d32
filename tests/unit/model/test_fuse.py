"""Joined products and quantised activations: the same model, in another form."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels.pages import empty_pages
from step3_jax.config import TextConfig
from step3_jax.layers.attention import CacheStep
from step3_jax.layers.linear import Linear
from step3_jax.layers.moe import STACKS, Experts
from step3_jax.model.fuse import fuse, is_quantised, separate, set_quantised
from step3_jax.model.layers import LayerStack, stack_layers
from step3_jax.model.text import Decoder
from step3_jax.quant import quantise

CONFIG = TextConfig(
    hidden_size=128,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    head_dim=128,
    share_q_dim=128,
    moe_num_experts=4,
    moe_top_k=3,
    moe_intermediate_size=128,
    share_expert_dim=128,
    moe_layers=(1,),
    vocab_size=64,
    max_position_embeddings=512,
)


def make_decoder(weights: str = "float32", config: TextConfig = CONFIG) -> Decoder:
    decoder = Decoder(config, dtype=jnp.dtype(jnp.float32), rngs=nnx.Rngs(0))
    if weights == "fp8":
        for path, module in nnx.iter_modules(decoder):
            if isinstance(module, Linear) and path[0] == "layers":
                module.weight.set_value(quantise(module.weight.get_value()))
            for name in STACKS if isinstance(module, Experts) else ():
                stack = getattr(module, name)
                stack.set_value(quantise(stack.get_value()))
    return decoder


def run(decoder: Decoder) -> np.ndarray:
    """Logits of a decode step of two sequences over a cache of random rows."""
    graphdef, state = nnx.split(decoder)
    step = CacheStep(jnp.asarray([[0], [1]], jnp.int32), jnp.asarray([6, 4], jnp.int32))
    empty = empty_pages(2 * CONFIG.num_hidden_layers, CONFIG.head_dim, "float32")
    cache = jax.tree.map(lambda pages: jax.random.normal(jax.random.key(0), pages.shape), empty)

    @jax.jit
    def logits(state: nnx.State) -> jax.Array:
        text = nnx.merge(graphdef, state)
        return text.logits(text(text.embed_tokens(jnp.asarray([[1], [2]])), cache=cache, step=step)[0][:, 0])

    return np.asarray(logits(state))


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    return run(make_decoder())


def test_joined_products_give_what_separate_ones_give(expected: np.ndarray) -> None:
    decoder = make_decoder()
    before = jax.tree.leaves(nnx.state(decoder))
    fuse(decoder)
    attention, share_expert = decoder.layers[1].attention.self_attn, decoder.layers[1].ffn.share_expert
    assert attention.q_proj is attention.k_proj is attention.v_proj is None
    assert attention.qkv_down_proj.weight.get_value().shape == (128 + 2 * 128, 128)
    assert share_expert.gate_up_proj.weight.get_value().shape == (256, 128)
    np.testing.assert_allclose(run(decoder), expected, atol=1e-5)
    separate(decoder)
    for old, new in zip(before, jax.tree.leaves(nnx.state(decoder)), strict=True):
        np.testing.assert_array_equal(old, new)


def test_stacked_layers_in_fp8_are_joined_and_separated() -> None:
    decoder = make_decoder("fp8", dataclasses.replace(CONFIG, num_hidden_layers=3, moe_layers=(1, 2)))
    decoder.layers = nnx.List(stack_layers(decoder.layers))
    before = jax.tree.leaves(nnx.state(decoder))
    fuse(decoder)
    stack = decoder.layers[1]
    assert isinstance(stack, LayerStack)
    weight = stack.stacked.attention.self_attn.qkv_down_proj.weight.get_value()
    assert weight.values.shape == (2, 384, 128)
    assert weight.scales.shape == (2, 3, 1)
    separate(decoder)
    for old, new in zip(before, jax.tree.leaves(nnx.state(decoder)), strict=True):
        np.testing.assert_array_equal(old.astype(jnp.float32), new.astype(jnp.float32))


def test_shapes_are_joined_as_arrays_are() -> None:
    decoder = nnx.eval_shape(make_decoder)
    fuse(decoder)
    assert decoder.layers[0].ffn.mlp.gate_up_proj.weight.get_value().shape == (256, 128)


def test_weights_of_two_kinds_and_parts_of_a_block_stay_apart() -> None:
    decoder = make_decoder("fp8")
    attention, mlp = decoder.layers[0].attention.self_attn, decoder.layers[0].ffn.mlp
    attention.k_proj.weight.set_value(jnp.zeros((128, 128)))
    for part in (mlp.gate_proj, mlp.up_proj):
        part.weight.set_value(quantise(jnp.zeros((64, 128))))
    fuse(decoder)
    assert attention.qkv_down_proj is None
    assert mlp.gate_up_proj is None
    assert decoder.layers[1].attention.self_attn.qkv_down_proj is not None


def test_quantised_activations_are_the_models_to_say_and_no_platforms() -> None:
    decoder = make_decoder("fp8")
    plain = run(decoder)
    assert not is_quantised(decoder)
    set_quantised(decoder, wanted=True)
    assert is_quantised(decoder)
    layer = decoder.layers[1]
    assert layer.attention.input_layernorm.quantises
    assert layer.attention.self_attn.inter_norm.quantises
    assert layer.attention.post_attention_layernorm.quantises
    assert layer.attention.post_attention_layernorm.keeps_plain
    assert not decoder.norm.quantises
    found = run(decoder)
    errors = np.linalg.norm(found - plain, axis=1) / np.linalg.norm(plain, axis=1)
    # Ten products or so, each with 2.6 % of noise.
    assert 0.005 < np.median(errors) < 0.25
    fuse(decoder)
    np.testing.assert_allclose(run(decoder), found, atol=1e-5)


def test_the_ffn_alone_may_meet_plain_activations() -> None:
    decoder = make_decoder("fp8")
    set_quantised(decoder, wanted=True, has_plain_ffn=True)
    layer = decoder.layers[1]
    assert layer.attention.input_layernorm.quantises
    assert layer.attention.self_attn.o_proj.takes_rows
    assert not layer.attention.post_attention_layernorm.quantises
    assert not is_quantised(layer.ffn)


def test_weights_that_are_not_in_fp8_meet_plain_activations(expected: np.ndarray) -> None:
    decoder = make_decoder()
    set_quantised(decoder, wanted=True)
    assert not is_quantised(decoder)
    assert not decoder.layers[0].attention.input_layernorm.quantises
    np.testing.assert_array_equal(run(decoder), expected)
