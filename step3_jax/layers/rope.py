"""Rotary position embedding, neox style: pair (i, i + K/2), angles in float32."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.rope_cache_write.reference import rotate


def rope_table(
    positions: Int[Array, "B T"], *, head_dim: int, theta: float
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """Cosine and sine of position * theta^(-2i/K), i < K/2, in float32."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(
    heads: Float[Array, "B T *heads K"], cos: Float[Array, "B T half"], sin: Float[Array, "B T half"]
) -> Float[Array, "B T *heads K"]:
    """Rotates every head over all K dimensions; see `rotate`."""
    batch, length, half = cos.shape
    flat = heads.reshape(batch * length, *heads.shape[2:])
    return rotate(flat, cos.reshape(-1, half), sin.reshape(-1, half)).reshape(heads.shape)
