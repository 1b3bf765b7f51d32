"""The Hopper kernel of `fp8_matmul`.

One CTA per multiprocessor, persistent for the whole product: one warpgroup copies (TMA) blocks of 128 columns of x,
its scales and the weight into a ring in shared memory; one warpgroup for each 64 rows multiplies them
(wgmma m64n128k32 e4m3) and adds every block to float32 sums in registers, times its two scales. The ring continues from
one tile to the next, so that the copies never pause.

Cost: 2 M N K FLOPs; N K + M K bytes of operands, 2 M N of results. At M = 64 and 128 it is bound by the N K
bytes, from about M = 400 on by the FLOPs, and by what the multiprocessors can read from L2: a tile of 192 x 128 loads 40 KB
for 6.3 MFLOP, 37 bytes a clock and multiprocessor at 70 % of the peak. Two CTAs with neighbouring columns therefore form a
cluster, each copying half the rows of x to both: 26 bytes a clock. (A tile twice as wide would need 256 registers a
thread: the assembler keeps two products apart.) If there are fewer tiles than multiprocessors, a cluster has 2, 4 or 8
CTAs for each tile: they split its K, and sum the results among themselves (see `exchange`).

Rows and columns outside the arrays: a TMA copy fills them with zeros on the way in, and drops them on the way out. It
does so in whole groups of 8 rows; `_align` handles the rest.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tuning
from pallas_kernels.compat import WGMMA, WGMMA_ROW, Ref, Target, swizzled
from pallas_kernels.fp8_matmul.exchange import SHARE, Exchange, add_shares, finish, scratch
from pallas_kernels.fp8_matmul.schedule import NUM_SMS, Index, Schedule, default_blocks, make
from pallas_kernels.quantise import ScalesLayout, scales_to_columns
from pallas_kernels.storage import BLOCK

# Columns of one copy out of the registers: small, so that the ring gets the memory.
STORE_COLUMNS = 64
# Shared memory of a CTA, minus what Pallas needs for reductions and barriers.
SMEM_BYTES = 232_448 - 3 * 1024
MAX_STAGES = 8
# Name of the axis of a cluster over the CTAs with neighbouring columns.
NEIGHBOUR = "neighbour"
# Registers of a multiplying and of a copying thread, by the number of multiplying warpgroups: they start with
# 168 (3 warpgroups in all) or 128 (4), and cannot exceed that in total. 2 have all they need from the start.
REGISTERS = {2: (232, 40), 3: (152, 56)}


def fp8_matmul(
    x: jax.Array,
    x_scales: jax.Array,
    weight: jax.Array,
    weight_scales: jax.Array,
    layer: jax.Array,
    *,
    scales_layout: ScalesLayout,
    out_dtype: jnp.dtype,
    interpret: bool,
    detect_races: bool = False,
    block_m: int | None = None,
    split_k: int | None = None,
    cluster: int | None = None,
    stages: int | None = None,
    num_ctas: int = NUM_SMS,
) -> jax.Array:
    """See `api`; weight is [L, N, K] and weight_scales [L, N/128, K/128].

    The blocks are those of `tuning`, unless given: rows of a tile (64, 128 or 192), CTAs that share a tile's K (1, 2, 4 or
    8), CTAs that share what they copy of x (1 or 2), buffers in the ring.
    """
    target = Target(interpret=interpret, detect_races=detect_races)
    if scales_layout == "rows":
        x_scales = scales_to_columns(x_scales)
    (m, k), n = x.shape, weight.shape[1]
    given = {"block_m": block_m, "split_k": split_k, "cluster": cluster, "stages": stages}
    blocks = choose_blocks(m, n, k) | {name: value for name, value in given.items() if value is not None}
    if not target.has_clusters:
        blocks.update(cluster=1, split_k=1)
    x, x_scales, weight, weight_scales, layer = _align(
        x, x_scales, weight, weight_scales, layer, blocks["block_m"], target
    )
    rows, columns = x.shape[0], n + -n % (STORE_COLUMNS if target.clips_copies else BLOCK)
    if blocks["split_k"] > 1:
        # Copies are clipped at the end of the result; partial sums along K are stored by the threads, and must fit.
        rows, columns = rows + -rows % blocks["block_m"], n + -n % (BLOCK * blocks["cluster"])
    tiling = {name: blocks[name] for name in ("block_m", "split_k", "cluster")}
    schedule = make(rows, columns, k, **tiling, num_ctas=num_ctas)
    # Memory limits the ring, whatever a file of measurements says about a neighbouring shape.
    num_stages = min(blocks["stages"], max_stages(blocks["block_m"], blocks["split_k"]))
    return _run(x, x_scales, weight, weight_scales, layer, schedule, num_stages, out_dtype, target)[:m, :n]


def choose_blocks(m: int, n: int, k: int) -> dict[str, int]:
    """Blocks for a shape: measured, or else estimated."""
    blocks = default_blocks(m, n, k)
    stages = max_stages(blocks["block_m"], blocks["split_k"])
    return tuning.blocks("fp8_matmul", {**blocks, "stages": stages}, m=m, n=n, k=k)


def max_stages(block_m: int, split: int) -> int:
    """Buffers of the ring that fit into shared memory, at most 8: more hide no further latency."""
    stage = (block_m + BLOCK) * BLOCK + block_m * 4
    # Data from the other CTAs of a cluster, or results on their way out.
    rest = block_m * (BLOCK if split > 1 else STORE_COLUMNS) * 4
    return min(MAX_STAGES, (SMEM_BYTES - rest) // stage)


def _run(
    x: jax.Array,
    x_scales: jax.Array,
    weight: jax.Array,
    weight_scales: jax.Array,
    layer: jax.Array,
    schedule: Schedule,
    stages: int,
    out_dtype: jnp.dtype,
    target: Target,
) -> jax.Array:
    """The product [M, N] in `out_dtype`."""
    block_m = schedule.block_m
    num_warpgroups = block_m // 64
    # Each buffer is free after every multiplying warpgroup has read it: in both CTAs, if they share copies.
    free = {"num_arrivals": num_warpgroups, "num_barriers": stages}
    axes = {NEIGHBOUR: schedule.cluster, SHARE: schedule.split}
    axes = {name: size for name, size in axes.items() if size > 1}
    workers = min(schedule.num_workers, schedule.num_tiles)
    out_type = [jax.ShapeDtypeStruct((schedule.m, schedule.n), out_dtype)]
    if schedule.split > 1:
        out_scratch = scratch(target, schedule.split, num_warpgroups)
        if target.interpret:
            parts = (workers, schedule.cluster, schedule.split, num_warpgroups, 64, BLOCK)
            out_type.append(jax.ShapeDtypeStruct(parts, jnp.float32))
    else:
        out_scratch = [plgpu.SMEM((num_warpgroups, 64, STORE_COLUMNS), out_dtype, transforms=swizzled(out_dtype))]
    return plgpu.kernel(
        functools.partial(_body, schedule=schedule, num_outputs=len(out_type), target=target),
        out_type=out_type,
        grid=(workers,),
        grid_names=("worker",),
        cluster=tuple(axes.values()),
        cluster_names=tuple(axes),
        num_threads=num_warpgroups + 1,
        thread_name="warpgroup",
        kernel_name="fp8_matmul",
        scratch_types=[
            plgpu.SMEM((stages, block_m, BLOCK), x.dtype, transforms=swizzled(x.dtype)),
            plgpu.SMEM((stages, block_m), jnp.float32),
            plgpu.SMEM((stages, BLOCK, BLOCK), weight.dtype, transforms=swizzled(weight.dtype)),
            # Each buffer is full after three copies.
            plgpu.Barrier(num_arrivals=3, num_barriers=stages),
            plgpu.ClusterBarrier(collective_axes=(NEIGHBOUR,), **free)
            if schedule.cluster > 1
            else plgpu.Barrier(**free),
            *out_scratch,
        ],
        **target.kernel_options(),
    )(layer.reshape(1), x, x_scales, weight, weight_scales)[0]


def _body(
    layer_ref: Ref,
    x_ref: Ref,
    x_scales_ref: Ref,
    weight_ref: Ref,
    weight_scales_ref: Ref,
    *refs: Ref,
    schedule: Schedule,
    num_outputs: int,
    target: Target,
) -> None:
    outputs, (x_smem, x_scales_smem, weight_smem, full, free, *out_scratch) = refs[:num_outputs], refs[num_outputs:]
    worker, warpgroup = lax.axis_index("worker"), lax.axis_index("warpgroup")
    # Index of the CTA among those that split a tile's K, and among those with neighbouring columns.
    share = lax.axis_index(SHARE) if schedule.split > 1 else jnp.int32(0)
    neighbour = lax.axis_index(NEIGHBOUR) if schedule.cluster > 1 else jnp.int32(0)
    stages = jnp.int32(x_smem.shape[0])
    block_m = schedule.block_m
    num_warpgroups = block_m // 64
    layer = layer_ref[0]
    exchange = None
    if schedule.split > 1:
        exchange = Exchange(*out_scratch, parts=outputs[1].at[worker, neighbour] if num_outputs == 2 else None)

    @pl.when(warpgroup < num_warpgroups)
    def _multiply() -> None:
        if num_warpgroups in REGISTERS:
            plgpu.set_max_registers(REGISTERS[num_warpgroups][0], action="increase")
        rows = pl.ds(warpgroup * 64, 64)

        def visit(tile: Index, start: Index, stop: Index, done: Index) -> None:
            row_tile, column_tile = schedule.place(tile)
            column_block = column_tile * schedule.cluster + neighbour
            # The second CTA of a cluster may be outside the weight: its product is dropped, but it takes part in the ring.
            scale_row = jnp.minimum(column_block, weight_scales_ref.shape[1] - 1)

            def scale_of(block: Index) -> jax.Array:
                # A share may be empty, and start at the end.
                return weight_scales_ref[layer, scale_row, jnp.minimum(block, schedule.depth - 1)]

            def add_block(block: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                total, weight_scale = carry
                slot = lax.rem(done + block - start, stages)
                # One block ahead, so that a cache miss does not stall between two products.
                next_scale = scale_of(block + 1)
                plgpu.barrier_wait(full.at[slot])
                x_scales = target.load(x_scales_smem.at[slot, rows], WGMMA_ROW)
                product = target.dot(x_smem.at[slot, rows], weight_smem.at[slot])
                # `dot` has waited for the tensor cores: they have read the buffer.
                target.finish_reads()
                plgpu.barrier_arrive(free.at[slot])
                return total + product * lax.broadcast_in_dim(x_scales * weight_scale, product.shape, [0]), next_scale

            first = target.full((64, BLOCK), 0.0, WGMMA), scale_of(start)
            total, _ = lax.fori_loop(start, stop, add_block, first)
            row = row_tile * block_m + warpgroup * 64
            if exchange is not None:
                total = add_shares(target, exchange, total, warpgroup, tile == worker)
                columns = pl.ds(column_block * BLOCK + share * total.shape[1], total.shape[1])
                # From registers: four threads write a sector of a row.
                outputs[0][pl.ds(row, 64), columns] = total.astype(outputs[0].dtype)
                return
            store = out_scratch[0].at[warpgroup]
            for column in range(0, BLOCK, STORE_COLUMNS):
                # The previous copy must have read the buffer; it need not have arrived yet.
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                store[...] = total[:, column : column + STORE_COLUMNS].astype(store.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(
                    store,
                    outputs[0].at[pl.ds(row, 64), pl.ds(column_block * BLOCK + column, STORE_COLUMNS)],
                )

        schedule.for_each_tile(worker, share, visit)
        if exchange is not None:
            finish(exchange, warpgroup, worker < schedule.num_tiles)
        else:
            plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == num_warpgroups)
    def _copy() -> None:
        if num_warpgroups in REGISTERS:
            plgpu.set_max_registers(REGISTERS[num_warpgroups][1], action="decrease")

        def visit(tile: Index, start: Index, stop: Index, done: Index) -> None:
            row_tile, column_tile = schedule.place(tile)
            rows = pl.ds(row_tile * block_m, block_m)
            columns = pl.ds((column_tile * schedule.cluster + neighbour) * BLOCK, BLOCK)

            def copy_block(block: jax.Array, carry: tuple[()]) -> tuple[()]:
                index = done + block - start
                slot = lax.rem(index, stages)

                @pl.when(index >= stages)
                def _() -> None:
                    plgpu.barrier_wait(free.at[slot])

                depth = pl.ds(block * BLOCK, BLOCK)
                # Each of the neighbours copies its part of the rows to all of them.
                plgpu.copy_gmem_to_smem(
                    x_ref.at[rows, depth],
                    x_smem.at[slot],
                    full.at[slot],
                    collective_axes=NEIGHBOUR if schedule.cluster > 1 else None,
                )
                plgpu.copy_gmem_to_smem(weight_ref.at[layer, columns, depth], weight_smem.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(x_scales_ref.at[block, rows], x_scales_smem.at[slot], full.at[slot])
                return carry

            lax.fori_loop(start, stop, copy_block, ())

        total = schedule.for_each_tile(worker, share, visit)

        def drain(index: jax.Array, carry: tuple[()]) -> tuple[()]:
            plgpu.barrier_wait(free.at[lax.rem(index, stages)])
            return carry

        lax.fori_loop(jnp.maximum(total - stages, 0), total, drain, ())


def _align(
    x: jax.Array,
    x_scales: jax.Array,
    weight: jax.Array,
    weight_scales: jax.Array,
    layer: jax.Array,
    block_m: int,
    target: Target,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Pads what the copies cannot clip: they go by 8 rows of 128 bytes, and clip only whole ones (up to 8 rows, any).

    Step3's weights are aligned, in every layer and on every number of devices; other weights would be copied here each time,
    one layer of them. Zeros add nothing.
    """
    (m, k), n = x.shape, weight.shape[1]
    rows, columns = (0 if size <= 8 else -size % 8 for size in (m, n))
    if not target.clips_copies:
        rows, columns = -m % block_m, -n % BLOCK
    depth = -k % BLOCK
    if columns or depth:
        weight, weight_scales = (lax.dynamic_slice_in_dim(stack, layer, 1) for stack in (weight, weight_scales))
        weight, layer = jnp.pad(weight, ((0, 0), (0, columns), (0, depth))), jnp.zeros_like(layer)
    if rows or depth:
        x = jnp.pad(x, ((0, rows), (0, depth)))
    if not target.clips_copies:
        x_scales = jnp.pad(x_scales, ((0, 0), (0, m + rows - x_scales.shape[1])))
    return x, x_scales, weight, weight_scales, layer
