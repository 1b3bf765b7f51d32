"""Losses: next-token prediction, and the balance of the router's load."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from step3_jax.layers.router import Routing


class RouterLoad(NamedTuple):
    """How evenly a layer's router spreads its tokens.

    Attributes:
      loss: E * sum_e share_e * probability_e, 1 when even (Switch Transformer, arXiv 2101.03961, eq. 4).
      shares: Share of the chosen (token, expert) pairs that each expert got, [E]; 1/E when even.
    """

    loss: Float[Array, ""]
    shares: Float[Array, " E"]


def token_loss(logits: Float[Array, "N V"], targets: Int[Array, " N"]) -> Float[Array, " N"]:
    """Cross entropy of each token in nats."""
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(logits, axis=1) - picked


def router_load(routing: Routing) -> RouterLoad:
    """Balance of one layer's routing over N tokens."""
    num_experts = routing.logits.shape[1]
    chosen = jax.nn.one_hot(routing.experts.reshape(-1), num_experts, dtype=jnp.float32)
    shares = jnp.mean(chosen, axis=0)
    probabilities = jnp.mean(jax.nn.softmax(routing.logits, axis=-1), axis=0)
    return RouterLoad(num_experts * jnp.sum(jax.lax.stop_gradient(shares) * probabilities), shares)
