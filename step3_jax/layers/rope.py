"""Rotary position embedding, neox style: pair (i, i + K/2), angles in float32."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


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
    """Rotates every head over all K dimensions; cosine and sine are cast to the dtype of `heads` first."""
    shape = cos.shape[:2] + (1,) * (heads.ndim - 3) + cos.shape[-1:]
    cos, sin = cos.reshape(shape).astype(heads.dtype), sin.reshape(shape).astype(heads.dtype)
    first, second = jnp.split(heads, 2, axis=-1)
    # Stacked, not concatenated: XLA:CPU then writes both halves in one loop, in a quarter of the time.
    rotated = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-2)
    return rotated.reshape(heads.shape)
