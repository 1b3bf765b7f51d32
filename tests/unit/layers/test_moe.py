"""The forms of the routed experts against a plain loop over tokens and choices."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from step3_jax.layers import moe
from step3_jax.layers.moe import (
    MAX_SINGLE_PAIRS,
    Experts,
    experts_by_block,
    experts_by_capacity,
    experts_by_pair,
    separate_experts,
)
from step3_jax.quant import dequantise, quantise

NUM_EXPERTS, WIDTH, INNER, TOP_K = 5, 12, 9, 3


def loop(hidden, weights, experts, gate, up, down):
    """out[n] = sum_j w[n, j] * down_e(silu(gate_e x_n) * up_e x_n), in float64."""
    out = np.zeros(hidden.shape)
    for token, x in enumerate(hidden.astype(np.float64)):
        for weight, expert in zip(weights[token], experts[token], strict=True):
            inner = gate[expert] @ x
            out[token] += weight * (down[expert] @ (inner / (1 + np.exp(-inner)) * (up[expert] @ x)))
    return out


def choices(kind, num_tokens, rng):
    """Expert ids [N, top_k]: spread, all on one expert, or never on expert 2."""
    if kind == "one expert":
        return np.full((num_tokens, TOP_K), 3)
    allowed = [0, 1, 3, 4] if kind == "empty expert" else range(NUM_EXPERTS)
    return np.stack([rng.permutation(allowed)[:TOP_K] for _ in range(num_tokens)])


@pytest.fixture(scope="module")
def stacks():
    rng = np.random.default_rng(1)
    shapes = [(NUM_EXPERTS, INNER, WIDTH), (NUM_EXPERTS, INNER, WIDTH), (NUM_EXPERTS, WIDTH, INNER)]
    return [rng.normal(size=shape).astype(np.float32) * 0.3 for shape in shapes]


def inputs(kind, num_tokens):
    rng = np.random.default_rng(2)
    hidden = rng.normal(size=(num_tokens, WIDTH)).astype(np.float32)
    weights = rng.uniform(size=(num_tokens, TOP_K)).astype(np.float32)
    return hidden, weights, choices(kind, num_tokens, rng).astype(np.int32)


def run_jitted(layer, *arrays):
    graphdef, state = nnx.split(layer)
    return jax.jit(lambda state, *arrays: nnx.merge(graphdef, state)(*arrays))(state, *arrays)


FORMS = {
    "by pair": jax.jit(experts_by_pair),
    "by block": jax.jit(experts_by_block),
    "by capacity": jax.jit(lambda *arrays: experts_by_capacity(*arrays, capacity=TOP_K * arrays[0].shape[0])),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["spread", "one expert", "empty expert"])
def test_every_form_equals_the_loop(stacks, form, kind):
    args = inputs(kind, 6)
    found = FORMS[form](*(jnp.asarray(array) for array in (*args, *stacks)))
    np.testing.assert_allclose(found, loop(*args, *stacks), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["spread", "one expert"])
@pytest.mark.parametrize("num_tokens", [1, 67])
def test_blocks_hold_any_number_of_tokens(stacks, kind, num_tokens):
    args = inputs(kind, num_tokens)
    found = FORMS["by block"](*(jnp.asarray(array) for array in (*args, *stacks)))
    np.testing.assert_allclose(found, loop(*args, *stacks), rtol=0, atol=1e-5)


def test_pairs_beyond_the_capacity_contribute_nothing(stacks):
    hidden, weights, _ = inputs("spread", 4)
    experts = np.tile(np.array([[0, 1, 2]], np.int32), (4, 1))
    run = jax.jit(functools.partial(experts_by_capacity, capacity=3))
    found = run(*(jnp.asarray(array) for array in (hidden, weights, experts, *stacks)))
    kept = weights * (np.arange(4)[:, None] < 3)
    np.testing.assert_allclose(found, loop(hidden, kept, experts, *stacks), rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_tokens", [MAX_SINGLE_PAIRS // TOP_K, MAX_SINGLE_PAIRS // TOP_K + 1])
def test_module_gives_the_same_whichever_form_it_takes(stacks, num_tokens):
    layer = Experts(NUM_EXPERTS, WIDTH, INNER, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
    for parameter, stack in zip((layer.gate_proj, layer.up_proj, layer.down_proj), stacks, strict=True):
        parameter.set_value(jnp.asarray(stack))
    args = inputs("spread", num_tokens)
    found = run_jitted(layer, *(jnp.asarray(array) for array in args))
    np.testing.assert_allclose(found, loop(*args, *stacks), rtol=0, atol=1e-5)


def test_module_takes_quantised_stacks(stacks):
    layer = Experts(NUM_EXPERTS, WIDTH, INNER, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
    scaled = [quantise(jnp.asarray(stack), block=(4, 4)) for stack in stacks]
    for parameter, stack in zip((layer.gate_proj, layer.up_proj, layer.down_proj), scaled, strict=True):
        parameter.set_value(stack)
    args = inputs("spread", 3)
    found = run_jitted(layer, *(jnp.asarray(array) for array in args))
    plain = [np.asarray(dequantise(stack)) for stack in scaled]
    np.testing.assert_allclose(found, loop(*args, *plain), rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_tokens", [1, 2, 40])
def test_separate_experts_give_what_the_stacks_give_and_leave_the_model_as_it_was(num_tokens, monkeypatch):
    monkeypatch.setattr(moe, "MIN_SEPARATE_BYTES", 0)
    layer = Experts(NUM_EXPERTS, WIDTH, INNER, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
    apart = nnx.merge(*nnx.split(layer))
    separate_experts(apart)
    assert isinstance(layer.gate_proj[...], jax.Array)
    assert apart.gate_proj[...].shape == layer.gate_proj[...].shape
    args = [jnp.asarray(array) for array in inputs("spread", num_tokens)]
    np.testing.assert_allclose(jax.jit(apart.__call__)(*args), jax.jit(layer.__call__)(*args), atol=1e-6)


def test_small_experts_stay_stacked():
    layer = Experts(NUM_EXPERTS, WIDTH, INNER, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
    separate_experts(layer)
    assert isinstance(layer.gate_proj[...], jax.Array)


def test_separate_experts_refuse_training(monkeypatch):
    monkeypatch.setattr(moe, "MIN_SEPARATE_BYTES", 0)
    layer = Experts(NUM_EXPERTS, WIDTH, INNER, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
    separate_experts(layer)
    layer.capacity_factor = 1.0
    with pytest.raises(ValueError, match="training"):
        layer(*(jnp.asarray(array) for array in inputs("spread", 4)))
