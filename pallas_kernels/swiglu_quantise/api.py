"""`swiglu_quantise`: checks its arguments and chooses the implementation."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.common import Implementation, dispatch
from pallas_kernels.quantise import ScalesLayout, check_layout
from pallas_kernels.storage import BLOCK
from pallas_kernels.swiglu_quantise import mosaic, reference


def swiglu_quantise(
    gate: Float[Array, "M columns"],
    up: Float[Array, "M F"] | None = None,
    *,
    scales_layout: ScalesLayout = "rows",
    implementation: Implementation = "auto",
) -> tuple[Float[Array, "M F"], Float[Array, "scale_rows scale_columns"]]:
    """SwiGLU, then FP8 with one scale for each 128 columns: quantise_rows(silu(gate) up), all in float32.

    Args:
      gate: [M, F]; or, without `up`, both side by side, [M, 2 F], from one product with the joined weights: the
        kernel reads either half in place.
      up: [M, F], of the same dtype: bfloat16 or float32.
      scales_layout: "rows" [M, ceil(F/128)]; "columns" as `fp8_matmul` reads it, [ceil(F/128), M rounded up to 4], the
        kernel's native layout.
      implementation: See `pallas_kernels.common`. The kernel needs F to be a multiple of 128; it is fastest with M up to 8
        or a multiple of 8, otherwise the operands are copied.

    Returns:
      e4m3 values [M, F] and float32 scales.

    Raises:
      ValueError: If shapes or dtypes do not fit.
      NotImplementedError: If the kernel is requested by name and cannot serve.
    """
    check_layout(scales_layout)
    if up is None:
        if gate.ndim != 2 or gate.shape[1] % 2 or 0 in gate.shape:
            raise ValueError(f"gate is {gate.shape}; without up it must be [M, 2 F], no size 0")
        arrays: tuple[jax.Array, ...] = (gate,)
        columns = gate.shape[1] // 2
    else:
        if gate.ndim != 2 or gate.shape != up.shape or gate.dtype != up.dtype or 0 in gate.shape:
            raise ValueError(
                f"gate is {gate.dtype}{gate.shape} and up {up.dtype}{up.shape}; both must be [M, F] of one dtype, "
                "no size 0"
            )
        arrays = gate, up
        columns = gate.shape[1]
    if gate.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"gate is {gate.dtype}; allowed: bfloat16, float32")

    def run_reference(gate: jax.Array, *rest: jax.Array) -> tuple[jax.Array, jax.Array]:
        gate, up = (gate, *rest) if rest else jnp.split(gate, 2, axis=1)
        return reference.swiglu_quantise(gate, up, scales_layout=scales_layout)

    return dispatch(
        implementation,
        f"the kernel needs F to be a multiple of {BLOCK}, but it is {columns}" if columns % BLOCK else None,
        run_reference,
        functools.partial(mosaic.swiglu_quantise, scales_layout=scales_layout),
        *arrays,
    )
