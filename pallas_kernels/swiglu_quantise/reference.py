"""The meaning of `swiglu_quantise`, in plain JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.quantise import ScalesLayout, quantise_rows


def swiglu_quantise(
    gate: Float[Array, "M F"], up: Float[Array, "M F"], *, scales_layout: ScalesLayout
) -> tuple[jax.Array, jax.Array]:
    """Values and scales."""
    product = jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
    return quantise_rows(product, scales_layout=scales_layout)
