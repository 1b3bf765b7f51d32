"""Linear projection with weights in the checkpoint's (out, in) layout."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.common import dispatch
from pallas_kernels.fp8_matmul.api import fp8_matmul
from pallas_kernels.quantise import quantise_rows
from pallas_kernels.storage import BLOCK as FP8_BLOCK
from step3_jax.quant import BlockScaled, dequantise
from step3_jax.stack import LayerOf, parts, pick

# XLA:CPU has no bfloat16 product of a vector: it writes the whole matrix out in float32 first. From two rows on it calls
# a library that reads bfloat16 as it is, best from four rows.
MIN_CPU_ROWS = 4


class Linear(nnx.Module):
    """y = x W^T (+ b). The weight is [out, in], as the checkpoint stores it."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = False,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.weight = nnx.Param(normal(rngs, (out_features, in_features), in_features, dtype))
        self.bias = nnx.Param(jnp.zeros((out_features,), dtype)) if use_bias else None

    def __call__(self, hidden: Float[Array, "*batch features_in"]) -> Float[Array, "*batch features_out"]:
        out = linear(hidden, self.weight[...])
        return out if self.bias is None else out + self.bias[...]


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, dtype: jnp.dtype) -> Array:
    """Normal with standard deviation fan_in^-0.5."""
    return (jax.random.normal(rngs.params(), shape, jnp.float32) * fan_in**-0.5).astype(dtype)


def linear(
    hidden: Float[Array, "*batch features_in"], weight: Float[Array, "features_out features_in"] | BlockScaled | LayerOf
) -> Float[Array, "*batch features_out"]:
    """x W^T in the dtype of `hidden`, summed in float32.

    Leading axes are flattened first: on XLA:CPU the gradient of a weight contracted over two axes misses the fast
    matrix product (3x slower). On CPUs a few rows in bfloat16 are filled up with zeros (see `MIN_CPU_ROWS`).

    A block-scaled weight is multiplied in FP8 where the GPU kernel serves: 16-bit activations are then quantised too.
    Elsewhere the weight is dequantised.
    """
    stack, _ = parts(weight)
    if isinstance(stack, BlockScaled):
        return dispatch("auto", fp8_unsupported(hidden.dtype, stack), _linear_dequantised, _linear_fp8, hidden, weight)
    weight = pick(weight)
    flat = hidden.reshape(-1, hidden.shape[-1])
    num_rows = flat.shape[0]
    if num_rows < MIN_CPU_ROWS and flat.dtype == weight.dtype == jnp.bfloat16 and jax.default_backend() == "cpu":
        flat = jnp.pad(flat, ((0, MIN_CPU_ROWS - num_rows), (0, 0)))
    out = jax.lax.dot_general(flat, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return out[:num_rows].astype(hidden.dtype).reshape(*hidden.shape[:-1], weight.shape[0])


def fp8_unsupported(dtype: jnp.dtype, weight: BlockScaled) -> str | None:
    """Why activations of `dtype` are not multiplied with `weight` in FP8; None if they can be."""
    if dtype.itemsize > 2:
        return f"FP8 products are for 16-bit activations, not {dtype}: who asks for more does not want them quantised"
    if weight.block != (FP8_BLOCK, FP8_BLOCK):
        return f"FP8 products are for blocks of {FP8_BLOCK} x {FP8_BLOCK}, not {weight.block}"
    return None


def _linear_dequantised(
    hidden: Float[Array, "*batch features_in"], weight: BlockScaled | LayerOf
) -> Float[Array, "*batch features_out"]:
    return linear(hidden, dequantise(pick(weight), hidden.dtype))


def _linear_fp8(
    hidden: Float[Array, "*batch features_in"], weight: BlockScaled | LayerOf, *, interpret: bool
) -> Float[Array, "*batch features_out"]:
    stack, layer = parts(weight)
    values, scales = quantise_rows(hidden.reshape(-1, hidden.shape[-1]), scales_layout="columns")
    out = fp8_matmul(
        values,
        scales,
        stack.values,
        stack.scales,
        layer=layer,
        scales_layout="columns",
        out_dtype=hidden.dtype,
        implementation="interpret" if interpret else "mosaic",
    )
    return out.reshape(*hidden.shape[:-1], weight.shape[0])
