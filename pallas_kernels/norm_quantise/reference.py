"""The meaning of `norm_quantise`, in plain JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.quantise import ScalesLayout, quantise_rows


def norm_quantise(
    x: Float[Array, "M columns"],
    weight: Float[Array, "L D"],
    layer: Int[Array, ""],
    *,
    eps: float,
    scales_layout: ScalesLayout,
    with_normed: bool,
) -> tuple[jax.Array, ...]:
    """Values, scales, and the norm itself if requested."""
    weight = jax.lax.dynamic_index_in_dim(weight, layer, keepdims=False)
    x = x[:, : weight.shape[0]]
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    normed = (wide * scale).astype(x.dtype) * weight
    quantised = quantise_rows(normed, scales_layout=scales_layout)
    return (*quantised, normed) if with_normed else quantised
