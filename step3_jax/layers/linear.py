"""Linear projection with weights in the checkpoint's (out, in) layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pallas_kernels.fp8_matmul.api import fp8_matmul
from pallas_kernels.quantise import FP8
from pallas_kernels.storage import BLOCK as FP8_BLOCK
from step3_jax.cpu_kernels.loader import Kernels
from step3_jax.layers.rows import Rows, as_plain, as_rows
from step3_jax.layers.stored import multiply
from step3_jax.quant import BlockScaled, PackedInt4, Quantised, dequantise
from step3_jax.stack import LayerOf, parts, pick

# XLA:CPU has no bfloat16 matrix-vector product: it writes the whole matrix out in float32 first. From two rows on it calls
# a library that reads bfloat16 directly, best from four rows.
MIN_CPU_ROWS = 4


class Linear(nnx.Module):
    """y = x W^T (+ b). The weight is [out, in], as the checkpoint stores it.

    Attributes:
      quantises: Whether activations are quantised before a product with a weight in FP8, and both multiplied in FP8; see
        `model.fuse.set_quantised`. Otherwise such a weight is dequantised.
      cpu_kernels: Multiply with the weight as stored, if `model.cpu` has set them.
    """

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
        self.quantises = False
        self.cpu_kernels: Kernels | None = None

    @property
    def takes_rows(self) -> bool:
        """Whether it multiplies quantised rows."""
        return self.quantises and is_fp8(self.weight.get_value())

    def __call__(self, hidden: Float[Array, "*batch features_in"] | Rows) -> Float[Array, "*batch features_out"]:
        """The product; for `Rows` it has one leading axis."""
        weight = self.weight[...]
        if self.cpu_kernels is not None:
            (out,) = multiply(self.cpu_kernels, as_plain(hidden), [weight])
        elif self.takes_rows:
            out = linear_rows(as_rows(hidden), weight).reshape(*hidden.shape[:-1], -1)
        else:
            out = linear(hidden, weight)
        return out if self.bias is None else out + self.bias[...]


def project(
    hidden: Float[Array, "*batch features_in"] | Rows, linears: Sequence[Linear]
) -> list[Float[Array, "*batch _"]]:
    """The outputs of several bias-free layers for the same input; the CPU kernels compute them in one call."""
    kernels = linears[0].cpu_kernels
    if kernels is None or any(one.cpu_kernels != kernels or one.bias is not None for one in linears):
        return [one(hidden) for one in linears]
    return multiply(kernels, as_plain(hidden), [one.weight[...] for one in linears])


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, dtype: jnp.dtype) -> Array:
    """Normal with standard deviation fan_in^-0.5."""
    return (jax.random.normal(rngs.params(), shape, jnp.float32) * fan_in**-0.5).astype(dtype)


def linear(
    hidden: Float[Array, "*batch features_in"], weight: Float[Array, "features_out features_in"] | Quantised | LayerOf
) -> Float[Array, "*batch features_out"]:
    """x W^T in the dtype of `hidden`, summed in float32.

    Leading axes are flattened first: on XLA:CPU the gradient of a weight contracted over two axes misses the fast
    matrix product (3x slower). On CPUs a few rows in bfloat16 are padded with zeros (see `MIN_CPU_ROWS`).

    A quantised weight is dequantised first.
    """
    picked = pick(weight)
    is_quantised = isinstance(picked, BlockScaled | PackedInt4)
    plain = cast(Array, dequantise(picked, hidden.dtype) if is_quantised else picked)
    flat = hidden.reshape(-1, hidden.shape[-1])
    if flat.shape[0] < MIN_CPU_ROWS and flat.dtype == plain.dtype == jnp.bfloat16:
        # By the platform that the program is compiled for: beside GPUs some parts of a model may be on CPUs.
        out = jax.lax.platform_dependent(flat, plain, cpu=_multiply_filled, default=_multiply)
    else:
        out = _multiply(flat, plain)
    return out.astype(hidden.dtype).reshape(*hidden.shape[:-1], plain.shape[0])


def _multiply(
    rows: Float[Array, "N features_in"], weight: Float[Array, "features_out features_in"]
) -> Float[Array, "N features_out"]:
    return jax.lax.dot_general(rows, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _multiply_filled(
    rows: Float[Array, "N features_in"], weight: Float[Array, "features_out features_in"]
) -> Float[Array, "N features_out"]:
    filled = jnp.pad(rows, ((0, MIN_CPU_ROWS - rows.shape[0]), (0, 0)))
    return _multiply(filled, weight)[: rows.shape[0]]


def linear_rows(rows: Rows, weight: Float[Array, "..."] | BlockScaled | LayerOf) -> Float[Array, "N features_out"]:
    """The product of quantised rows with a weight in FP8, of one layer or in a stack; summed in float32."""
    stored, layer = fp8_parts(weight)
    return fp8_matmul(
        rows.values,
        rows.scales,
        stored.values,
        stored.scales,
        layer=layer,
        scales_layout="columns",
        out_dtype=rows.dtype,
    )


def fp8_parts(weight: Float[Array, "..."] | BlockScaled | LayerOf) -> tuple[BlockScaled, Int[Array, ""] | None]:
    """A weight for which `is_fp8` holds, or its stack, and the number of the layer there.

    Raises:
      ValueError: For any other weight.
    """
    stored, layer = parts(weight)
    if not isinstance(stored, BlockScaled):
        raise ValueError(f"a weight in FP8 has values and scales, but this is a {type(stored).__name__}")
    return stored, layer


def is_fp8(weight: Float[Array, "..."] | BlockScaled | LayerOf) -> bool:
    """Whether a weight is in FP8 with the block size that the FP8 products take."""
    stored, _ = parts(weight)
    return isinstance(stored, BlockScaled) and stored.values.dtype == FP8 and stored.block == (FP8_BLOCK, FP8_BLOCK)
