"""The Hopper kernel of `norm_quantise`: one pass, where XLA needs two kernels (four if the norm itself is returned too).

A CTA is one warpgroup and has one row: it copies the row and the weight into shared memory as D/128 rows of 128 columns,
so that the sums and maxima of the 128-column blocks are row reductions; the row's own sum goes through shared memory. It
reads 2 D bytes per row and writes D + D/32, and 2 D with the norm: about 1.4 MB at 64 rows of 7,168, half a microsecond of
bandwidth, so the launch dominates. Registers (95, with the norm 162) let 5 or 3 CTAs share a multiprocessor
and hide one another's latency.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.compat import WGMMA, Ref, Target, swizzled, unswizzled
from pallas_kernels.quantise import FP8, FP8_MAX, ScalesLayout, scales_shape
from pallas_kernels.storage import BLOCK

# Rows of a tensor-core layout: a row of x fills D/128 of them, the others are never read.
TILE = 64


def norm_quantise(
    x: jax.Array,
    weight: jax.Array,
    layer: jax.Array,
    *,
    eps: float,
    scales_layout: ScalesLayout,
    with_normed: bool,
    interpret: bool,
    detect_races: bool = False,
) -> tuple[jax.Array, ...]:
    """See `api`; weight is [L, D]."""
    target = Target(interpret=interpret, detect_races=detect_races)
    m, size = x.shape[0], weight.shape[1]
    blocks = size // BLOCK
    normed_dtype = jnp.promote_types(x.dtype, weight.dtype)
    out_type = [
        jax.ShapeDtypeStruct((m, blocks, BLOCK), FP8),
        jax.ShapeDtypeStruct(scales_shape((m, size), scales_layout), jnp.float32),
    ]
    # A copy into a swizzled buffer needs arrays of whole tiles of 8 rows; the columns of a joined product may be 20.
    transforms = swizzled(x.dtype) if x.shape[1] // BLOCK % 8 == 0 else unswizzled()
    scratch_types = [
        plgpu.SMEM((TILE, BLOCK), x.dtype, transforms=transforms),
        plgpu.SMEM((TILE, BLOCK), weight.dtype, transforms=swizzled(weight.dtype)),
        plgpu.SMEM((TILE, BLOCK), FP8, transforms=swizzled(FP8)),
        plgpu.SMEM((TILE,), jnp.float32),
        plgpu.SMEM((TILE,), jnp.float32),
        # Two copies arrive.
        plgpu.Barrier(num_arrivals=2),
    ]
    if with_normed:
        out_type.append(jax.ShapeDtypeStruct((m, blocks, BLOCK), normed_dtype))
        scratch_types.append(plgpu.SMEM((TILE, BLOCK), normed_dtype, transforms=swizzled(normed_dtype)))
    values, scales, *normed = plgpu.kernel(
        functools.partial(
            _body, eps=eps, by_columns=scales_layout == "columns", with_normed=with_normed, target=target
        ),
        out_type=out_type,
        grid=(m,),
        grid_names=("row",),
        scratch_types=scratch_types,
        kernel_name="norm_quantise",
        **target.kernel_options(),
    )(layer.reshape(1), x.reshape(m, -1, BLOCK), weight.reshape(-1, blocks, BLOCK))
    return (values.reshape(m, size), scales, *(array.reshape(m, size) for array in normed))


def _body(
    layer_ref: Ref,
    x_ref: Ref,
    weight_ref: Ref,
    values_ref: Ref,
    scales_ref: Ref,
    *rest: Ref,
    eps: float,
    by_columns: bool,
    with_normed: bool,
    target: Target,
) -> None:
    normed_ref, rest = (rest[0], rest[1:]) if with_normed else (None, rest)
    x_smem, weight_smem, values_smem, sums_smem, scales_smem, copied, *normed_smem = rest
    row = lax.axis_index("row")
    blocks = weight_ref.shape[1]
    used = pl.ds(0, blocks)

    plgpu.copy_gmem_to_smem(x_ref.at[row, used], x_smem.at[used], copied)
    plgpu.copy_gmem_to_smem(weight_ref.at[layer_ref[0]], weight_smem.at[used], copied)
    plgpu.barrier_wait(copied)

    wide = target.load(x_smem, WGMMA).astype(jnp.float32)
    sums_smem[...] = jnp.sum(wide * wide, axis=1)
    # All threads' sums must be there before any thread adds them up.
    plgpu.commit_smem()
    total = sums_smem[0]
    for block in range(1, blocks):
        total = total + sums_smem[block]
    normed = (wide * lax.rsqrt(total / (blocks * BLOCK) + eps)).astype(x_ref.dtype)
    weight = target.load(weight_smem, WGMMA)
    dtype = jnp.promote_types(x_ref.dtype, weight_ref.dtype)
    # The float32 product of two bfloat16 numbers is exact: one rounding, as in a bfloat16 product.
    normed = (normed.astype(jnp.float32) * weight.astype(jnp.float32)).astype(dtype)

    wide = normed.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=1)
    scales = jnp.where(largest > 0.0, largest / FP8_MAX, 1.0)
    scaled = wide / lax.broadcast_in_dim(scales, wide.shape, [0])
    values_smem[...] = jnp.clip(scaled, -FP8_MAX, FP8_MAX).astype(FP8)
    scales_smem[...] = scales
    if with_normed:
        normed_smem[0][...] = normed
    # The writes must be visible to the copies, and to the threads that read the scales.
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(values_smem.at[used], values_ref.at[row])
    if with_normed:
        plgpu.copy_smem_to_gmem(normed_smem[0].at[used], normed_ref.at[row])
    if by_columns:
        # One number every M * 4 bytes: too narrow for a copy.
        for block in range(blocks):
            scales_ref[block, row] = scales_smem[block]
    else:
        plgpu.copy_smem_to_gmem(scales_smem.at[used], scales_ref.at[row])
    plgpu.wait_smem_to_gmem(0)
