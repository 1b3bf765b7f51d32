"""Normalisation: RMSNorm of the decoder, LayerNorm of the vision tower."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from step3_jax.stack import pick


class RMSNorm(nnx.Module):
    """w * cast(x / sqrt(mean(x^2) + eps)): statistics in float32, cast back before the multiplication (spec, section 4)."""

    def __init__(self, size: int, *, eps: float, dtype: jnp.dtype = jnp.float32) -> None:
        self.weight = nnx.Param(jnp.ones((size,), dtype))
        self.eps = eps

    def __call__(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        return rms_norm(hidden, pick(self.weight[...]), eps=self.eps)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(var + eps) * w + b, statistics in float32."""

    def __init__(self, size: int, *, eps: float, dtype: jnp.dtype = jnp.float32) -> None:
        self.weight = nnx.Param(jnp.ones((size,), dtype))
        self.bias = nnx.Param(jnp.zeros((size,), dtype))
        self.eps = eps

    def __call__(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        wide = hidden.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.eps)
        out = centred * scale * self.weight[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return out.astype(hidden.dtype)


def rms_norm(hidden: Float[Array, "*batch D"], weight: Float[Array, " D"], *, eps: float) -> Float[Array, "*batch D"]:
    """Root-mean-square normalisation; `weight` multiplies plainly (not 1 + w)."""
    wide = hidden.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * scale).astype(hidden.dtype) * weight
