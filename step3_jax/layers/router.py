"""The router: which experts a token goes to, and with what weights."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from step3_jax.cpu_kernels.loader import Kernels
from step3_jax.layers.linear import normal
from step3_jax.layers.norm import pick_rows
from step3_jax.layers.stored import multiply
from step3_jax.stack import parts


class Routing(NamedTuple):
    """What the router decides for N tokens.

    Attributes:
      weights: Mixing weights, float32 [N, top_k].
      experts: Expert ids, int32 [N, top_k].
      logits: Router logits, float32 [N, E] (for the load-balance loss and for tests).
    """

    weights: Float[Array, "N top_k"]
    experts: Int[Array, "N top_k"]
    logits: Float[Array, "N E"]


class Router(nnx.Module):
    """Softmax over all experts in float32, then the largest `top_k`.

    Attributes:
      cpu_kernels: Multiply with the weight as stored, if `model.cpu` has set them.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        top_k: int,
        renormalise: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        self.weight = nnx.Param(normal(rngs, (num_experts, hidden_size), hidden_size, dtype))
        self.top_k = top_k
        self.renormalise = renormalise
        self.cpu_kernels: Kernels | None = None

    def __call__(self, hidden: Float[Array, "N D"]) -> Routing:
        weight, layer = parts(self.weight[...])
        weight = weight if layer is None else pick_rows(weight, layer)
        if self.cpu_kernels is None:
            return route(hidden, weight, top_k=self.top_k, renormalise=self.renormalise)
        (logits,) = multiply(self.cpu_kernels, hidden.astype(jnp.float32), [weight])
        return choose(logits, top_k=self.top_k, renormalise=self.renormalise)


def count_tokens(routing: Routing, num_tokens: Int[Array, ""], num_experts: int) -> Int[Array, " E"]:
    """Tokens that each expert gets in a layer.

    Args:
      routing: The layer's routing.
      num_tokens: The leading tokens that count; the others are padding.
      num_experts: E.
    """
    is_token = jnp.arange(routing.experts.shape[0]) < num_tokens
    places = jnp.where(is_token[:, None], routing.experts, num_experts)
    return jnp.zeros((num_experts,), jnp.int32).at[places].add(1, mode="drop")


def route(
    hidden: Float[Array, "N D"], weight: Float[Array, "E D"], *, top_k: int, renormalise: bool = False
) -> Routing:
    """Chooses `top_k` experts for each token.

    The product is taken in float32 whatever the dtype: in bfloat16 the third and fourth expert often tie.

    Args:
      hidden: Tokens after the post-attention norm.
      weight: Router matrix. Replicated, never quantised.
      top_k: Experts per token; 3 for Step3.
      renormalise: Whether the chosen weights are scaled to sum to 1. The released model does not.

    Raises:
      ValueError: If `top_k` is not in [1, E].
    """
    logits = jax.lax.dot_general(
        hidden.astype(jnp.float32),
        weight.astype(jnp.float32),
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
    )
    return choose(logits, top_k=top_k, renormalise=renormalise)


def choose(logits: Float[Array, "N E"], *, top_k: int, renormalise: bool = False) -> Routing:
    """The experts of each token from the router's float32 logits; see `route`.

    Raises:
      ValueError: If `top_k` is not in [1, E].
    """
    if not 1 <= top_k <= logits.shape[1]:
        raise ValueError(f"top_k is {top_k}; allowed: 1 to {logits.shape[1]}, the number of experts")
    weights, experts = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), top_k)
    if renormalise:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return Routing(weights, experts.astype(jnp.int32), logits)
