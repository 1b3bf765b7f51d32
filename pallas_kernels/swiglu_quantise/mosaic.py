"""The Hopper kernel of `swiglu_quantise`: one pass, where XLA needs three kernels and reads both operands twice.

A CTA is one warpgroup and has one tile: 64 rows of one block of 128 columns, so that its 64 scales are adjacent in
the "columns" layout. It reads 2 x 2 bytes per number and writes 1, and 1/32 of a scale. Registers (200) let two
CTAs share a multiprocessor, one copying while the other computes: 32 KB in flight, where 18 KB cover the latency of
HBM (3.35 TB/s x 0.7 us / 132). That replaces a ring, and a small product is spread over most multiprocessors.

Rows past M: a TMA copy fills them with zeros on the way in, and drops them on the way out. Not so the scales: an unswizzled
copy goes out as plain bytes, clipped at the end of the whole array and not of its row, so the last tile stores only
what its row has room for.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.compat import WGMMA, Ref, Target, swizzled
from pallas_kernels.quantise import FP8, FP8_MAX, ScalesLayout, scales_shape, scales_to_rows
from pallas_kernels.storage import BLOCK

TILE = 64
LOG2_E = 1.4426950408889634


def swiglu_quantise(
    gate: jax.Array,
    up: jax.Array | None = None,
    *,
    scales_layout: ScalesLayout,
    interpret: bool,
    detect_races: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See `api`."""
    target = Target(interpret=interpret, detect_races=detect_races)
    m, columns = gate.shape
    if up is None:
        columns //= 2
    # Copies clip whole groups of 8 rows, and any number up to 8 rows.
    rows = m + (0 if m <= 8 else -m % 8)
    if not target.clips_copies:
        rows = m + -m % TILE
    operands = [
        array if rows == m else jnp.pad(array, ((0, rows - m), (0, 0))) for array in (gate, up) if array is not None
    ]
    values, scales = plgpu.kernel(
        functools.partial(_body, up_at=columns if up is None else 0, target=target),
        out_type=[
            jax.ShapeDtypeStruct((rows, columns), FP8),
            jax.ShapeDtypeStruct(scales_shape((rows, columns), "columns"), jnp.float32),
        ],
        grid=(columns // BLOCK, -(-rows // TILE)),
        grid_names=("block", "tile"),
        scratch_types=[
            plgpu.SMEM((TILE, BLOCK), gate.dtype, transforms=swizzled(gate.dtype)),
            plgpu.SMEM((TILE, BLOCK), gate.dtype, transforms=swizzled(gate.dtype)),
            plgpu.SMEM((TILE, BLOCK), FP8, transforms=swizzled(FP8)),
            plgpu.SMEM((TILE,), jnp.float32),
            # Two copies arrive.
            plgpu.Barrier(num_arrivals=2),
        ],
        kernel_name="swiglu_quantise",
        **target.kernel_options(),
    )(operands[0], operands[-1])
    if rows != m:
        values, scales = values[:m], scales[:, : scales_shape((m, columns), "columns")[1]]
    return values, scales if scales_layout == "columns" else scales_to_rows(scales, m)


def _body(
    gate_ref: Ref,
    up_ref: Ref,
    values_ref: Ref,
    scales_ref: Ref,
    gate_smem: Ref,
    up_smem: Ref,
    values_smem: Ref,
    scales_smem: Ref,
    copied: Ref,
    *,
    up_at: int,
    target: Target,
) -> None:
    """`up_at`: the column where up starts in its array."""
    block, tile = lax.axis_index("block"), lax.axis_index("tile")
    rows = pl.ds(tile * TILE, TILE)
    plgpu.copy_gmem_to_smem(gate_ref.at[rows, pl.ds(block * BLOCK, BLOCK)], gate_smem, copied)
    plgpu.copy_gmem_to_smem(up_ref.at[rows, pl.ds(up_at + block * BLOCK, BLOCK)], up_smem, copied)
    plgpu.barrier_wait(copied)

    gate = target.load(gate_smem, WGMMA).astype(jnp.float32)
    up = target.load(up_smem, WGMMA).astype(jnp.float32)
    product = gate / (1.0 + jnp.exp2(gate * -LOG2_E)) * up
    largest = jnp.max(jnp.abs(product), axis=1)
    scales = jnp.where(largest > 0.0, largest / FP8_MAX, 1.0)
    scaled = product / lax.broadcast_in_dim(scales, product.shape, [0])
    values_smem[...] = jnp.clip(scaled, -FP8_MAX, FP8_MAX).astype(FP8)
    scales_smem[...] = scales
    # The writes must be visible to the copies.
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(values_smem, values_ref.at[rows, pl.ds(block * BLOCK, BLOCK)])
    full_tiles, rest = _tiles_of(scales_ref.shape[1])

    @pl.when(tile < full_tiles)
    def _store_scales() -> None:
        plgpu.copy_smem_to_gmem(scales_smem, scales_ref.at[block, rows])

    if rest:

        @pl.when(tile == full_tiles)
        def _store_last_scales() -> None:
            last = pl.ds(tile * TILE, rest)
            plgpu.copy_smem_to_gmem(scales_smem.at[pl.ds(0, rest)], scales_ref.at[block, last])

    plgpu.wait_smem_to_gmem(0)


def _tiles_of(columns: int) -> tuple[int, int]:
    """Whole tiles of the scales' columns, and columns of the last one: a multiple of 4, 16 bytes, as copies require."""
    return divmod(columns, TILE)
