"""The router: softmax over all experts, the largest few, not renormalised."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from step3_jax.layers.router import route


@pytest.fixture(scope="module")
def hidden_and_weight():
    rng = np.random.default_rng(0)
    return rng.normal(size=(7, 8)).astype(np.float32), rng.normal(size=(6, 8)).astype(np.float32)


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("top_k", [1, 3, 6])
def test_the_largest_probabilities_as_they_are(hidden_and_weight, top_k):
    hidden, weight = hidden_and_weight
    routing = route(jnp.asarray(hidden), jnp.asarray(weight), top_k=top_k)
    probabilities = softmax(hidden @ weight.T)
    order = np.argsort(-probabilities)[:, :top_k]
    np.testing.assert_array_equal(routing.experts, order)
    np.testing.assert_allclose(routing.weights, np.take_along_axis(probabilities, order, 1), rtol=1e-5)
    np.testing.assert_allclose(routing.logits, hidden @ weight.T, atol=1e-5)
    assert routing.experts.dtype == jnp.int32


def test_renormalised_weights_sum_to_one(hidden_and_weight):
    hidden, weight = hidden_and_weight
    routing = route(jnp.asarray(hidden), jnp.asarray(weight), top_k=3, renormalise=True)
    np.testing.assert_allclose(np.sum(routing.weights, axis=-1), np.ones(7), rtol=1e-6)
    assert np.all(np.sum(route(jnp.asarray(hidden), jnp.asarray(weight), top_k=3).weights, axis=-1) < 1)


def test_bfloat16_tokens_are_routed_in_float32(hidden_and_weight):
    hidden, weight = (jnp.asarray(array).astype(jnp.bfloat16) for array in hidden_and_weight)
    routing = route(hidden, weight, top_k=3)
    exact = np.asarray(hidden).astype(np.float32) @ np.asarray(weight).astype(np.float32).T
    assert routing.weights.dtype == jnp.float32
    np.testing.assert_allclose(routing.logits, exact, atol=1e-5)


@pytest.mark.parametrize("top_k", [0, -1, 7])
def test_impossible_top_k(hidden_and_weight, top_k):
    hidden, weight = (jnp.asarray(array) for array in hidden_and_weight)
    with pytest.raises(ValueError, match=f"top_k is {top_k}; allowed: 1 to 6, the number of experts"):
        route(hidden, weight, top_k=top_k)
