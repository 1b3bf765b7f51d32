"""SwiGLU feed-forward network: the dense layers and the shared expert."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from step3_jax.cpu_kernels.library import Kernels
from step3_jax.layers.linear import Linear
from step3_jax.layers.stored import run_swiglu


class SwiGLU(nnx.Module):
    """down(silu(gate x) * up x).

    Attributes:
      cpu_kernels: Compute all of it from weights as they are stored, if `model.cpu` has set them.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.gate_proj = Linear(hidden_size, intermediate_size, dtype=dtype, rngs=rngs)
        self.up_proj = Linear(hidden_size, intermediate_size, dtype=dtype, rngs=rngs)
        self.down_proj = Linear(intermediate_size, hidden_size, dtype=dtype, rngs=rngs)
        self.cpu_kernels: Kernels | None = None

    def __call__(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        if self.cpu_kernels is not None:
            linears = self.gate_proj, self.up_proj, self.down_proj
            return run_swiglu(self.cpu_kernels, hidden, [linear.weight[...] for linear in linears])
        return self.down_proj(jax.nn.silu(self.gate_proj(hidden)) * self.up_proj(hidden))
