"""The meaning of `fp8_matmul`, in plain JAX: both operands dequantised to float32, then one product."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.storage import BLOCK

# Rows of the weight that are dequantised at a time: the float32 copy of a whole one would be four times its size.
CHUNK = 1024


def fp8_matmul(
    x: Float[Array, "M K"],
    x_scales: Float[Array, "M K_blocks"],
    weight: Float[Array, "L N K"],
    weight_scales: Float[Array, "L N_blocks K_blocks"],
    layer: Int[Array, ""],
    *,
    out_dtype: jax.typing.DTypeLike,
) -> Float[Array, "M N"]:
    """y[m, n] = sum over k of (x[m, k] x_scales[m, k/128]) (w[n, k] weight_scales[n/128, k/128]), in float32."""
    (m, k), n = x.shape, weight.shape[1]
    wide = x.astype(jnp.float32) * jnp.repeat(x_scales, BLOCK, axis=1)[:, :k]
    scales = lax.dynamic_index_in_dim(weight_scales, layer, keepdims=False)

    def columns(start: jax.Array | int, count: int) -> jax.Array:
        """y[:, start : start + count]; start is a multiple of 128."""
        rows = lax.dynamic_slice(weight, (layer, jnp.int32(start), jnp.int32(0)), (1, count, k))[0]
        blocks = lax.dynamic_slice(scales, (jnp.int32(start) // BLOCK, 0), (-(-count // BLOCK), scales.shape[1]))
        expanded = jnp.repeat(jnp.repeat(blocks, BLOCK, axis=0)[:count], BLOCK, axis=1)[:, :k]
        product = jnp.matmul(wide, (rows.astype(jnp.float32) * expanded).T, precision=lax.Precision.HIGHEST)
        return product.astype(out_dtype)

    num_chunks = n // CHUNK
    parts = []
    if num_chunks:
        whole = lax.map(lambda chunk: columns(chunk * CHUNK, CHUNK), jnp.arange(num_chunks))
        parts.append(jnp.moveaxis(whole, 0, 1).reshape(m, num_chunks * CHUNK))
    if n % CHUNK:
        parts.append(columns(num_chunks * CHUNK, n % CHUNK))
    return jnp.concatenate(parts, axis=1)
