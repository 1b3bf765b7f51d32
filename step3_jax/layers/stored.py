"""Products of layers with weights in their stored form, by the CPU kernels. `model.cpu` decides which layers use them."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from step3_jax.cpu_kernels import api
from step3_jax.cpu_kernels.loader import Kernels
from step3_jax.quant import BlockScaled, PackedInt4, Quantised, dequantise

# Sizes differ from weight to weight, so the axes have no names that would bind.
Stored = Shaped[Array, "..."] | Quantised


def multiply(
    kernels: Kernels, hidden: Float[Array, "*batch features_in"], weights: Sequence[Stored]
) -> list[Float[Array, "*batch features_out"]]:
    """x W^T for several weights, in one call of a kernel."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    return [out.reshape(*hidden.shape[:-1], -1) for out in api.products(kernels, flat, weights)]


def run_swiglu(
    kernels: Kernels, hidden: Float[Array, "*batch D"], weights: Sequence[Stored]
) -> Float[Array, "*batch D"]:
    """down(silu(gate x) * up x), in one call of a kernel; `weights` are gate, up and down."""
    return api.swiglu(kernels, hidden.reshape(-1, hidden.shape[-1]), *weights).reshape(hidden.shape)


def take_rows(kernels: Kernels, table: Stored, ids: Int[Array, "*batch"]) -> Float[Array, "*batch columns"]:
    """Rows of a table, widened to float32; nothing else of it is read."""
    picked = ids.reshape(-1)
    if isinstance(table, PackedInt4):
        values, scales = (api.rows(kernels, part, picked) for part in (table.values, table.scales))
        rows = dequantise(PackedInt4(values, scales, table.num_columns))
    elif isinstance(table, BlockScaled):
        picked = jnp.clip(picked, 0, table.shape[0] - 1)
        scales = api.rows(kernels, table.scales, picked // table.block[0])
        rows = dequantise(BlockScaled(api.rows(kernels, table.values, picked), scales, (1, table.block[1])))
    else:
        rows = api.rows(kernels, table, picked).astype(jnp.float32)
    return rows.reshape(*ids.shape, -1)
