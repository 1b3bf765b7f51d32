"""The two losses against numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from step3_jax.layers.router import Routing
from step3_jax.train.loss import router_load, token_loss


def test_token_loss_is_cross_entropy_in_nats() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 4, (7, 11)).astype(np.float32)
    targets = rng.integers(0, 11, 7).astype(np.int32)
    exponents = np.exp(logits.astype(np.float64))
    expected = -np.log(exponents[np.arange(7), targets] / exponents.sum(axis=1))
    np.testing.assert_allclose(token_loss(jnp.asarray(logits), jnp.asarray(targets)), expected, rtol=1e-5)


def test_token_loss_of_bfloat16_logits_is_taken_in_float32() -> None:
    logits = jnp.full((1, 4096), 3.0, jnp.bfloat16)
    loss = token_loss(logits, jnp.zeros((1,), jnp.int32))
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, np.log(4096), rtol=1e-6)


def _routing(experts: np.ndarray, logits: np.ndarray) -> Routing:
    return Routing(jnp.full(experts.shape, 0.5), jnp.asarray(experts, jnp.int32), jnp.asarray(logits, jnp.float32))


def test_router_load_is_one_when_even() -> None:
    experts = np.array([[0, 1], [2, 3], [1, 0], [3, 2]])
    load = router_load(_routing(experts, np.zeros((4, 4))))
    np.testing.assert_allclose(load.loss, 1.0, rtol=1e-6)
    np.testing.assert_allclose(load.shares, 0.25)


def test_router_load_is_the_number_of_experts_when_one_takes_all() -> None:
    logits = np.full((6, 5), -30.0)
    logits[:, 2] = 30
    load = router_load(_routing(np.full((6, 1), 2), logits))
    np.testing.assert_allclose(load.loss, 5.0, rtol=1e-6)
    np.testing.assert_allclose(load.shares, [0, 0, 1, 0, 0])


def test_router_load_lowers_the_logit_of_a_busy_expert() -> None:
    experts = np.array([[0], [0], [0], [1]])

    def loss(logits: jax.Array) -> jax.Array:
        return router_load(_routing(experts, logits)).loss

    gradient = jax.grad(loss)(jnp.zeros((4, 2)))
    assert (gradient[:, 0] > 0).all()
    assert (gradient[:, 1] < 0).all()


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_shares_sum_to_one(num_tokens: int) -> None:
    experts = np.arange(num_tokens * 2).reshape(num_tokens, 2) % 4
    load = router_load(_routing(experts, np.random.default_rng(1).normal(size=(num_tokens, 4))))
    np.testing.assert_allclose(jnp.sum(load.shares), 1.0, rtol=1e-6)
