"""The Hopper kernels of `grouped_matmul`: two launches, gate + up + SwiGLU (+ quantise) and down (* router weight).

132 persistent CTAs. In each, one warpgroup copies (TMA) blocks of K into a ring in shared memory: the
tile's rows, their scales, and 128 rows of the expert's weights (of gate and of up: 256). Two warpgroups multiply: at
tiles of 128 rows each takes 64 rows, at tiles of 64 rows each takes half of the columns. The ring continues from one work
item to the next, so that the copies never pause.

A work item is a tile of rows and a block of columns. Items are ordered by expert, within an expert by block, within a
block by tile: concurrent items share an expert's rows, and a block of weights is read from memory once
for up to 16 tiles. The number of items is known only at run time; a CTA takes every 132nd until they are done.

Bytes of gate + up and down at full width (D 7,168, F 5,120), FP8: 110 MB per expert that has a row, 2 (D + F) per row; so
6 experts take 221 us at 3.0 TB/s, 48 take 1.76 ms. FLOPs: 6 D F per row, 220 MFLOP; compute-bound from about 300 rows
per expert on. If a tile is not full, only a quarter, half or all of its rows are copied: otherwise, at 16 rows per expert,
the copies of rows would be half as many as those of weights in `grouped_down`.

Compiled for sm_90a, no product loop spills. The FP8 gate + up at tiles of 128 rows spills 44 bytes per thread (96 if it
does not quantise) around it, once per work item: its two sums and a product take 192 of 232 registers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import tuning
from pallas_kernels.compat import Ref, Target, swizzled
from pallas_kernels.grouped_matmul.body import GROUP_ROWS, STORE_COLUMNS, Plan, run
from pallas_kernels.moe_permute import plan
from pallas_kernels.moe_permute.mosaic import permute_rows
from pallas_kernels.moe_permute.reference import (
    Permutation,
    Tiles,
    combine_rows,
    permute_columns,
    permute_weights,
    plan_permutation,
    point_at,
)
from pallas_kernels.quantise import FP8, quantise_rows
from pallas_kernels.storage import BLOCK

NUM_SMS = 132
# Shared memory of a CTA, minus what Pallas needs for reductions and barriers.
SMEM_BYTES = 232_448 - 3 * 1024
MAX_STAGES = 8
TILE_ROWS = (64, 128)

Pair = tuple[jax.Array, jax.Array]


def grouped_gate_up(
    rows: Array | Pair,
    gate: Array | Pair,
    up: Array | Pair,
    tiles: Tiles,
    *,
    quantise: bool,
    interpret: bool,
    detect_races: bool = False,
    blocks: dict[str, int] | None = None,
) -> Array | Pair:
    """See `api.grouped_gate_up`; the weights are stacks of matrices [G, F, D], the tiles point into them."""
    dtype = jnp.dtype(FP8 if quantise else jnp.bfloat16)
    out = _product(rows, (gate, up), None, tiles, dtype, interpret, detect_races, blocks)
    return (out[0], out[1]) if quantise else out[0]


def grouped_down(
    rows: Array | Pair,
    down: Array | Pair,
    row_weights: Float[Array, " R"],
    tiles: Tiles,
    *,
    interpret: bool,
    detect_races: bool = False,
    blocks: dict[str, int] | None = None,
) -> Array:
    """See `api.grouped_down`; the weights are a stack of matrices [G, D, F], the tiles point into it."""
    return _product(rows, (down,), row_weights, tiles, jnp.dtype(jnp.bfloat16), interpret, detect_races, blocks)[0]


def moe_ffn(
    x: Float[Array, "N D"] | Pair,
    weights: Float[Array, "N top_k"],
    experts: Int[Array, "N top_k"],
    layer: Int[Array, ""],
    gate: Array | Pair,
    up: Array | Pair,
    down: Array | Pair,
    *,
    num_experts: int,
    first_expert: int,
    all_experts: int,
    interpret: bool,
) -> Float[Array, "N D"]:
    """See `api.moe_ffn`; the shard's matrices are `num_experts` of each stack, those of `layer`."""
    permutation, row_weights = _plan(
        experts,
        weights,
        layer,
        num_experts=num_experts,
        first_expert=first_expert,
        tile_rows=tile_rows_for(experts.size, all_experts),
        interpret=interpret,
    )
    tiles, is_fp8 = permutation.tiles, isinstance(gate, tuple)
    if is_fp8:
        values, scales = quantise_rows(x, scales_layout="columns") if isinstance(x, jax.Array) else x
        rows = permute_rows(values, permutation, interpret=interpret), permute_columns(scales, permutation)
    else:
        rows = permute_rows(x, permutation, interpret=interpret)
    inner = grouped_gate_up(rows, gate, up, tiles, quantise=is_fp8, interpret=interpret)
    out = grouped_down(inner, down, row_weights, tiles, interpret=interpret)
    return combine_rows(out, permutation, x.dtype if isinstance(x, jax.Array) else out.dtype)


def _plan(
    experts: Int[Array, "N top_k"],
    weights: Float[Array, "N top_k"],
    layer: Int[Array, ""],
    *,
    num_experts: int,
    first_expert: int,
    tile_rows: int,
    interpret: bool,
) -> tuple[Permutation, Float[Array, " R"]]:
    """The permutation, with tiles pointing into the stack, and the weights of its rows: by a kernel if possible."""
    options = {"num_experts": num_experts, "first_expert": first_expert, "tile_rows": tile_rows}
    if plan.unsupported(experts.size, num_experts, tile_rows) is None:
        return plan.plan_permutation(experts, weights, layer, **options, interpret=interpret)
    permutation = plan_permutation(experts, **options)
    row_weights = permute_weights(weights, permutation)
    return permutation._replace(tiles=point_at(permutation.tiles, layer * num_experts)), row_weights


def tile_rows_for(num_pairs: int, num_experts: int) -> int:
    """Rows of a tile if `num_pairs` pairs are spread over `num_experts` experts: 64 while most experts fit in one."""
    default = 64 if num_pairs <= 40 * num_experts else 128
    return tuning.blocks("moe_ffn", {"tile_rows": default}, pairs=num_pairs, experts=num_experts)["tile_rows"]


def _max_stages(tile_rows: int, num_weights: int, is_fp8: bool) -> int:
    """Buffers of the ring that fit into shared memory, at most 8: more hide no further latency."""
    stage = (tile_rows + num_weights * BLOCK) * 128 + (tile_rows * 4 if is_fp8 else 0)
    staging = 2 * GROUP_ROWS * STORE_COLUMNS * 2
    return min(MAX_STAGES, (SMEM_BYTES - staging) // stage)


def _product(
    rows: Array | Pair,
    weights: tuple[Array | Pair, ...],
    row_weights: Array | None,
    tiles: Tiles,
    out_dtype: jnp.dtype,
    interpret: bool,
    detect_races: bool,
    blocks: dict[str, int] | None,
) -> list[Array]:
    """silu(rows gate^T) * (rows up^T), with scales if quantised, or row_weights * (rows down^T)."""
    target = Target(interpret=interpret, detect_races=detect_races)
    is_fp8 = isinstance(rows, tuple)
    values, *row_scales = rows if is_fp8 else (rows,)
    stacks = [weight[0] if is_fp8 else weight for weight in weights]
    # Flat: an address is then one number and a step.
    weight_scales = [weight[1].reshape(-1) for weight in weights] if is_fp8 else []
    num_rows, width = values.shape
    num_tiles = tiles.table.shape[0]
    tile_rows = num_rows // num_tiles
    num_columns = stacks[0].shape[1]
    most = _max_stages(tile_rows, len(stacks), is_fp8)
    if blocks is None:
        blocks = tuning.blocks(
            "grouped_gate_up" if len(stacks) == 2 else "grouped_down",
            {"stages": most, "ctas": NUM_SMS},
            tile_rows=tile_rows,
            columns=num_columns,
            width=width,
            dtype=values.dtype.name,
        )
    # Rows of 128 bytes, the span of the shared-memory swizzle: so one bulk copy per buffer.
    step_columns = 128 // values.dtype.itemsize
    plan = Plan(
        tile_rows=tile_rows,
        steps=width // step_columns,
        step_columns=step_columns,
        blocks=num_columns // BLOCK,
        stages=min(blocks["stages"], most),
        num_ctas=min(blocks["ctas"], num_tiles * (num_columns // BLOCK)),
        gated=len(stacks) == 2,
    )
    is_quantised = out_dtype == FP8
    out_type = [jax.ShapeDtypeStruct((num_rows, num_columns), out_dtype)]
    if is_quantised:
        out_type.append(jax.ShapeDtypeStruct((plan.blocks, num_rows), jnp.float32))
    row_bytes = STORE_COLUMNS * out_dtype.itemsize
    stage, swizzle = (plan.stages,), swizzled(values.dtype)
    scratch = {
        "rows_smem": plgpu.SMEM((*stage, tile_rows, step_columns), values.dtype, transforms=swizzle),
        "weights_smem": plgpu.SMEM((*stage, len(stacks), BLOCK, step_columns), stacks[0].dtype, transforms=swizzle),
        "out_smem": plgpu.SMEM(
            (2, GROUP_ROWS, STORE_COLUMNS),
            out_dtype,
            transforms=(plgpu.TilingTransform((8, STORE_COLUMNS)), plgpu.SwizzleTransform(row_bytes)),
        ),
        # A buffer is full after its copies, and free after both multiplying warpgroups have read it.
        "full": plgpu.Barrier(num_arrivals=1 + len(stacks) + len(row_scales), num_barriers=plan.stages),
        "free": plgpu.Barrier(num_arrivals=2, num_barriers=plan.stages),
    }
    if is_fp8:
        scratch["row_scales_smem"] = plgpu.SMEM((*stage, tile_rows), jnp.float32)
    if is_quantised and plan.row_groups == 1:
        scratch["largest_smem"] = plgpu.SMEM((2, 2, GROUP_ROWS), jnp.float32)
        scratch["met"] = plgpu.Barrier(num_arrivals=2)
    operands = [values, *row_scales, *stacks, *weight_scales, *([] if row_weights is None else [row_weights])]

    def body(table: Ref, used: Ref, *refs: Ref, **buffers: Ref) -> None:
        ends = [1, len(row_scales), len(stacks), len(weight_scales), 0 if row_weights is None else 1, len(out_type)]
        parts, start = [], 0
        for size in ends:
            parts.append(list(refs[start : start + size]))
            start += size
        run(plan, target, table, used, *parts, **buffers)

    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=(plan.num_ctas,),
        grid_names=("cta",),
        num_threads=3,
        thread_name="warpgroup",
        kernel_name="grouped_gate_up" if plan.gated else "grouped_down",
        scratch_types=scratch,
        **target.kernel_options(),
    )(tiles.table, tiles.used, *operands)
