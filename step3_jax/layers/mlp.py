"""SwiGLU feed-forward network: the dense layers and the shared expert."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.swiglu_quantise.api import swiglu_quantise
from step3_jax.cpu_kernels.loader import Kernels
from step3_jax.layers.linear import Linear
from step3_jax.layers.rows import Rows, as_plain
from step3_jax.layers.stored import Stored, run_swiglu


class SwiGLU(nnx.Module):
    """down(silu(gate x) * up x).

    Attributes:
      gate_up_proj: Gate and up joined into one product, replacing them, if `model.fuse.fuse` has done so.
      cpu_kernels: Compute all of it from weights in their stored form, if `model.cpu` has set them.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.gate_proj: Linear | None = Linear(hidden_size, intermediate_size, dtype=dtype, rngs=rngs)
        self.up_proj: Linear | None = Linear(hidden_size, intermediate_size, dtype=dtype, rngs=rngs)
        self.gate_up_proj: Linear | None = nnx.data(None)
        self.down_proj = Linear(intermediate_size, hidden_size, dtype=dtype, rngs=rngs)
        self.cpu_kernels: Kernels | None = None

    @property
    def takes_rows(self) -> bool:
        """Whether its first products multiply quantised rows."""
        first = self.gate_up_proj or self.gate_proj
        return first is not None and first.takes_rows

    @property
    def stored(self) -> list[Stored]:
        """The weights of gate, up and down, in the CPU kernels' form."""
        return [linear.weight[...] for linear in (self.gate_proj, self.up_proj, self.down_proj)]

    def __call__(self, hidden: Float[Array, "*batch D"] | Rows) -> Float[Array, "*batch D"]:
        if self.cpu_kernels is not None:
            return run_swiglu(self.cpu_kernels, as_plain(hidden), self.stored)
        inner = self._project(hidden)
        if not self.down_proj.takes_rows:
            gate, up = inner if len(inner) == 2 else jnp.split(inner[0], 2, axis=-1)
            return self.down_proj(jax.nn.silu(gate) * up)
        dtype = inner[0].dtype
        values, scales = swiglu_quantise(
            *(array.reshape(-1, array.shape[-1]) for array in inner), scales_layout="columns"
        )
        return self.down_proj(Rows(values, scales, None, dtype)).reshape(*hidden.shape[:-1], -1)

    def _project(self, hidden: Float[Array, "*batch D"] | Rows) -> tuple[Float[Array, "*batch F"], ...]:
        """Gate and up, or both side by side."""
        if self.gate_up_proj is not None:
            return (self.gate_up_proj(hidden),)
        return self.gate_proj(hidden), self.up_proj(hidden)
