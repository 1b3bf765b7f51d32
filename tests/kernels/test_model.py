"""The decoder on the kernels: a packed prefill chunk and a decode step, interpreted, against the plain path."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels.common import ENVIRONMENT_VARIABLE
from pallas_kernels.storage import PAGE_SIZE
from step3_jax.cache.paged import empty_cache
from step3_jax.config import TextConfig
from step3_jax.layers.attention import CacheStep
from step3_jax.layers.linear import Linear
from step3_jax.layers.moe import STACKS, Experts
from step3_jax.model.fuse import fuse, set_quantised
from step3_jax.model.text import Decoder
from step3_jax.quant import FP8, quantise
from tests.kernels.support import lower_for_cuda, row_errors

# Sizes that every kernel supports, and no more than needed: one dense layer and one with experts.
CONFIG = TextConfig(
    hidden_size=1024,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=64,
    head_dim=256,
    share_q_dim=1024,
    moe_num_experts=4,
    moe_top_k=3,
    moe_intermediate_size=128,
    share_expert_dim=128,
    moe_layers=(1,),
    vocab_size=256,
    max_position_embeddings=512,
)
PROMPTS = (70, 1, 40)
# bfloat16 rounds at 2^-9 in each of some twenty steps. FP8 weights are compared with products of the same quantised
# activations. Where those come out as equal, all does; a last bit that differs before (of a softmax, or of FP8 pages, which
# the kernel reads as float16) tips some of the values to the next of their steps of 2^-4, in each product more of them,
# until a tenth have.
TOLERANCE = {("bfloat16", "bfloat16"): 0.03, ("fp8", "bfloat16"): 0.12, ("fp8", "fp8"): 0.24}
# For the first token of a sequence, whose attention is to itself alone and so has no softmax that could differ.
FIRST_TOLERANCE = 0.01


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(kinds, marks=pytest.mark.kernels if kinds[0] == "fp8" else (), id="-".join(kinds))
        for kinds in TOLERANCE
    ],
)
def case(request):
    """Kind of weights, storage of the pages, and the decoder."""
    weights, storage = request.param
    decoder = Decoder(CONFIG, dtype=jnp.dtype(jnp.bfloat16), rngs=nnx.Rngs(0))
    if weights == "fp8":
        for path, module in nnx.iter_modules(decoder):
            if isinstance(module, Linear) and path[0] == "layers" and "router" not in path:
                module.weight.set_value(quantise(module.weight.get_value()))
            for name in STACKS if isinstance(module, Experts) else ():
                stack = getattr(module, name)
                stack.set_value(quantise(stack.get_value()))
        # As weights in FP8 are loaded on GPUs.
        set_quantised(decoder, wanted=True)
    fuse(decoder)
    return weights, storage, decoder


def functions(decoder: Decoder):
    """Prefill and decode as pure functions, and the weights; rebuilt for each implementation, which tracing picks."""
    graphdef, state = nnx.split(decoder)
    leaves, treedef = jax.tree.flatten(state)

    def run(leaves, tokens, cache, step):
        text = nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))
        hidden, cache = text(text.embed_tokens(tokens), cache=cache, step=step)
        return text.logits(hidden), cache

    return run, leaves


def inputs(storage: str):
    lengths = np.array(PROMPTS)
    pages_each = -(-(lengths + 1) // PAGE_SIZE)
    table = np.zeros((len(PROMPTS), pages_each.max()), np.int32)
    order = np.random.default_rng(0).permutation(pages_each.sum())
    for row, (count, end) in enumerate(zip(pages_each, np.cumsum(pages_each), strict=True)):
        table[row, :count] = order[end - count : end]
    cache = empty_cache(CONFIG, int(pages_each.sum()), storage)
    tokens = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (1, 128))
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    chunk = CacheStep(jnp.asarray(table), jnp.asarray(lengths, jnp.int32), jnp.asarray(starts))
    step = CacheStep(jnp.asarray(table), jnp.asarray(lengths + 1, jnp.int32))
    return jnp.asarray(tokens, jnp.int32), cache, chunk, step


# A minute of interpretation: each kernel by itself is compared by `make test` too.
@pytest.mark.kernels
def test_kernels_give_the_models_logits(case, monkeypatch) -> None:
    weights, storage, decoder = case
    tokens, cache, chunk, step = inputs(storage)
    last = jnp.asarray([[3], [5], [7]], jnp.int32)

    def logits(implementation: str) -> np.ndarray:
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, implementation)
        run, leaves = functions(decoder)
        read, filled = jax.jit(run)(leaves, tokens, cache, chunk)
        made, _ = jax.jit(run)(leaves, last, filled, step)
        return np.concatenate([np.asarray(read)[0, : sum(PROMPTS)], np.asarray(made)[:, 0]])

    found, expected = logits("interpret"), logits("reference")
    assert np.all(np.isfinite(found))
    errors = row_errors(found, expected)
    assert np.median(errors) < TOLERANCE[weights, storage] / 2
    if storage == "bfloat16":
        assert errors[np.cumsum((0, *PROMPTS[:-1]))].max() < FIRST_TOLERANCE
    # A token whose third and fourth expert tie may take the other one.
    assert np.mean(errors > TOLERANCE[weights, storage]) < 0.05
    assert errors.max() > 0, "both ran the same program"


def test_the_model_takes_the_kernels_on_a_gpu(case) -> None:
    weights, storage, decoder = case
    tokens, cache, chunk, step = inputs(storage)
    run, leaves = functions(decoder)
    num_moe = len(CONFIG.moe_layers)
    for ids, place in ((tokens, chunk), (jnp.zeros((3, 1), jnp.int32), step)):
        text = lower_for_cuda(run, leaves, ids, cache, place)
        # RoPE with the cache write, a function that all layers call, and attention; the experts' plan, gather and products.
        expected = 1 + CONFIG.num_hidden_layers + 4 * num_moe
        if weights == "fp8":
            # Three norms and three products of attention; two products and SwiGLU of a dense network or a shared expert.
            expected += 6 * CONFIG.num_hidden_layers + 3 * CONFIG.num_hidden_layers
        assert text.count("mosaic_gpu_v2") >= expected
    assert any(leaf.dtype == FP8 for leaf in leaves) == (weights == "fp8")
