"""`norm_quantise`: checks its arguments and chooses the implementation."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.common import Implementation, dispatch
from pallas_kernels.norm_quantise import mosaic, reference
from pallas_kernels.quantise import ScalesLayout, check_layout
from pallas_kernels.storage import BLOCK


def norm_quantise(
    x: Float[Array, "M columns"],
    weight: Float[Array, "*L D"],
    *,
    eps: float,
    layer: Int[Array, ""] | int | None = None,
    scales_layout: ScalesLayout = "rows",
    with_normed: bool = False,
    implementation: Implementation = "auto",
) -> tuple[Float[Array, "_ _"], ...]:
    """RMSNorm, then FP8 with one scale for each 128 columns.

    normed = weight cast(x / sqrt(mean(x^2) + eps)); values, scales = quantise_rows(normed)

    The statistics are in float32; the cast back to the dtype of x comes before the multiplication, as in the model's
    `rms_norm`.

    Args:
      x: bfloat16 or float32, [M, D]; or with more columns, of which only the first D are normed: other parts of a joined
        product may follow them. The kernel reads them in place if all columns are a multiple of 512.
      weight: Multiplies plainly (not 1 + w); [D], or a stack of layers [L, D].
      eps: Added to the mean square.
      layer: Which layer of a stack, 0 to L - 1; may be traced. The kernel reads it in place, without slicing.
      scales_layout: "rows" [M, ceil(D/128)]; "columns" as `fp8_matmul` reads it, [ceil(D/128), M rounded up to 4], where
        the kernel leaves entries past M undefined.
      with_normed: Also return `normed`, for its other users (the router, the residual of a shared expert).
      implementation: See `pallas_kernels.common`. The kernel needs D to be a multiple of 1,024, up to 8,192.

    Returns:
      e4m3 values [M, D], float32 scales, and with `with_normed` the norm [M, D].

    Raises:
      ValueError: If shapes or dtypes do not fit, or a layer is given without a stack or vice versa.
      NotImplementedError: If the kernel is requested by name and cannot serve.
    """
    check_layout(scales_layout)
    if x.ndim != 2 or weight.ndim not in (1, 2) or x.shape[1] < weight.shape[-1] or 0 in (*x.shape, *weight.shape):
        raise ValueError(
            f"x is {x.shape} and weight {weight.shape}; they must be [M, D] (or more columns) and [D] or [L, D], no size 0"
        )
    if (weight.ndim == 2) != (layer is not None):
        raise ValueError(
            f"weight is {weight.shape} and layer is {layer}: give a layer with a stack [L, D], and only with one"
        )
    for name, array in (("x", x), ("weight", weight)):
        if array.dtype not in (jnp.bfloat16, jnp.float32):
            raise ValueError(f"{name} is {array.dtype}; allowed: bfloat16, float32")
    return dispatch(
        implementation,
        _unsupported(weight.shape[-1], x.shape[1]),
        functools.partial(reference.norm_quantise, eps=eps, scales_layout=scales_layout, with_normed=with_normed),
        functools.partial(mosaic.norm_quantise, eps=eps, scales_layout=scales_layout, with_normed=with_normed),
        x,
        weight if layer is not None else weight[None],
        jnp.asarray(0 if layer is None else layer, jnp.int32),
    )


def _unsupported(size: int, columns: int) -> str | None:
    if size % 1024 or size > 8192:
        return f"the kernel needs D to be a multiple of 1024 and at most 8192, but it is {size}"
    if columns % (4 * BLOCK):
        return f"the kernel needs rows of a multiple of {4 * BLOCK} columns, but they have {columns}"
    return None
