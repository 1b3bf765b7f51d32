"""Products of layers with weights in their stored form, by the CPU kernels. `model.cpu` decides which layers use them."""

from __future__ import annotations

from collections.abc import Sequence

import jax
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


def take_rows(table: Stored, ids: Int[Array, "*batch"]) -> Float[Array, "*batch columns"]:
    """Rows of a table, widened to float32; nothing else of it is read."""
    if isinstance(table, PackedInt4):
        picked = PackedInt4(_take(table.values, ids), _take(table.scales, ids), table.num_columns)
        return dequantise(picked)
    if isinstance(table, BlockScaled):
        rows = jnp.clip(ids, 0, table.shape[0] - 1)
        scales = _take(table.scales, rows // table.block[0])
        return dequantise(BlockScaled(_take(table.values, rows), scales, (1, table.block[1])))
    return _take(table, ids).astype(jnp.float32)


def _take(table: Shaped[Array, "rows columns"], ids: Int[Array, "*batch"]) -> Shaped[Array, "*batch columns"]:
    """Rows of an array, read as bits: XLA:CPU would convert a whole array of small floats to float32 for that."""
    if table.dtype.itemsize > 2:
        return jnp.take(table, ids, axis=0, mode="clip")
    bits = jax.lax.bitcast_convert_type(table, jnp.uint8 if table.dtype.itemsize == 1 else jnp.uint16)
    return jax.lax.bitcast_convert_type(jnp.take(bits, ids, axis=0, mode="clip"), table.dtype)
