"""`fp8_matmul`: checks its arguments and chooses the implementation."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.common import Implementation, dispatch
from pallas_kernels.fp8_matmul import mosaic, reference
from pallas_kernels.quantise import FP8, ScalesLayout, check_layout, scales_shape, scales_to_rows
from pallas_kernels.storage import BLOCK


def fp8_matmul(
    x: Float[Array, "M K"],
    x_scales: Float[Array, "scale_rows scale_columns"],
    weight: Float[Array, "*L N K"],
    weight_scales: Float[Array, "*L N_blocks K_blocks"],
    *,
    layer: Int[Array, ""] | int | None = None,
    scales_layout: ScalesLayout = "rows",
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    implementation: Implementation = "auto",
) -> Float[Array, "M N"]:
    """Multiplies FP8 activations by an FP8 weight, both scaled by blocks.

    y[m, n] = sum over blocks b of x_scales[m, b] weight_scales[n/128, b] (x[m, 128b : 128b+128] . weight[n, same])

    The products of one block are summed by the tensor cores, the blocks in float32: so the shorter sums of Hopper's
    FP8 units (14 bits, DeepSeek-V3's report, section 3.3.2) do no harm.

    Args:
      x: e4m3 activations; `quantise_rows` makes them.
      x_scales: float32 scales of 1 x 128 blocks, [M, ceil(K/128)], or as `scales_layout` says.
      weight: e4m3 weights as in the checkpoint, [N, K], or a stack of layers [L, N, K].
      weight_scales: float32 scales of 128 x 128 blocks, [ceil(N/128), ceil(K/128)], stacked like `weight`.
      layer: Which layer of a stack, 0 to L - 1; may be traced. The kernel reads it in place, without slicing.
      scales_layout: "columns" saves a transposition, which is a separate launch.
      out_dtype: bfloat16, float16 or float32.
      implementation: See `pallas_kernels.common`. The kernel supports every shape; it is fastest with M up to
        8 or a multiple of 8 (else x is copied), N a multiple of 64 (else the result is) and K of 128 (else the weight is).

    Raises:
      ValueError: If dtypes or shapes do not fit, or a layer is given without a stack or vice versa.
    """
    check_layout(scales_layout)
    out_dtype = jnp.dtype(out_dtype)
    _check(x, x_scales, weight, weight_scales, layer, scales_layout, out_dtype)
    if weight.ndim == 2:
        weight, weight_scales = weight[None], weight_scales[None]
    index = jnp.asarray(0 if layer is None else layer, jnp.int32)

    def run_reference(x: jax.Array, x_scales: jax.Array, *rest: jax.Array) -> jax.Array:
        rows = x_scales if scales_layout == "rows" else scales_to_rows(x_scales, x.shape[0])
        return reference.fp8_matmul(x, rows, *rest, out_dtype=out_dtype)

    return dispatch(
        implementation,
        None,
        run_reference,
        functools.partial(mosaic.fp8_matmul, scales_layout=scales_layout, out_dtype=out_dtype),
        x,
        x_scales,
        weight,
        weight_scales,
        index,
    )


def _check(
    x: jax.Array,
    x_scales: jax.Array,
    weight: jax.Array,
    weight_scales: jax.Array,
    layer: jax.Array | int | None,
    scales_layout: ScalesLayout,
    out_dtype: jnp.dtype,
) -> None:
    for name, array, dtype in (
        ("x", x, FP8),
        ("weight", weight, FP8),
        ("x_scales", x_scales, jnp.float32),
        ("weight_scales", weight_scales, jnp.float32),
    ):
        if array.dtype != dtype:
            raise ValueError(f"{name} is {array.dtype}; it must be {jnp.dtype(dtype)}")
    if out_dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(f"out_dtype is {out_dtype}; allowed: bfloat16, float16, float32")
    if x.ndim != 2 or weight.ndim not in (2, 3) or weight.shape[-1] != x.shape[1]:
        raise ValueError(
            f"x is {x.shape} and weight {weight.shape}; they must be [M, K] and [N, K] or [L, N, K] with the same K"
        )
    if (weight.ndim == 3) != (layer is not None):
        raise ValueError(
            f"weight is {weight.shape} and layer is {layer}: give a layer with a stack [L, N, K], and only with one"
        )
    if isinstance(layer, int) and not 0 <= layer < weight.shape[0]:
        raise ValueError(f"layer is {layer}; the stack has layers 0 to {weight.shape[0] - 1}")
    wanted: tuple[int, ...] = scales_shape(x.shape, scales_layout)
    if x_scales.shape != wanted:
        raise ValueError(f"x_scales are {x_scales.shape}; for x {x.shape} in {scales_layout} they must be {wanted}")
    wanted = (*weight.shape[:-2], *(-(-size // BLOCK) for size in weight.shape[-2:]))
    if weight_scales.shape != wanted:
        raise ValueError(f"weight_scales are {weight_scales.shape}; for weight {weight.shape} they must be {wanted}")
    if 0 in (*x.shape, *weight.shape):
        raise ValueError(f"x is {x.shape} and weight {weight.shape}: no size may be 0")
