"""The work of one CTA of the `grouped_matmul` kernels; `mosaic` says why."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.compat import WGMMA, WGMMA_ROW, Ref, Target
from pallas_kernels.quantise import FP8_MAX
from pallas_kernels.storage import BLOCK

# Rows that a warpgroup multiplies: the tensor cores' tile.
GROUP_ROWS = 64
# Columns of one copy out of the registers.
STORE_COLUMNS = 64
# Sums of products, and the weights' scales of the next step.
Scaled = tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]
# A row whose largest value is below this is stored as zeros: the inverse of its scale would overflow.
TINY = 1e-30


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static sizes of a kernel.

    Attributes:
      tile_rows: Rows of a tile, 64 or 128.
      steps, step_columns: Blocks of K, and columns of one.
      blocks: Blocks of 128 columns of the output.
      stages: Buffers in the ring.
      num_ctas: CTAs.
      gated: Whether it is gate and up with SwiGLU; else one product times a weight per row.
    """

    tile_rows: int
    steps: int
    step_columns: int
    blocks: int
    stages: int
    num_ctas: int
    gated: bool

    @property
    def num_weights(self) -> int:
        return 2 if self.gated else 1

    @property
    def row_groups(self) -> int:
        """Warpgroups over the rows of a tile; the rest of the two are over its columns."""
        return self.tile_rows // GROUP_ROWS

    @property
    def columns(self) -> int:
        """Output columns of one warpgroup."""
        return BLOCK * self.row_groups // 2


def run(
    plan: Plan,
    target: Target,
    table: Ref,
    used: Ref,
    rows: list[Ref],
    row_scales: list[Ref],
    weights: list[Ref],
    weight_scales: list[Ref],
    row_weights: list[Ref],
    outputs: list[Ref],
    *,
    rows_smem: Ref,
    weights_smem: Ref,
    out_smem: Ref,
    full: Ref,
    free: Ref,
    row_scales_smem: Ref | None = None,
    largest_smem: Ref | None = None,
    met: Ref | None = None,
) -> None:
    """One CTA. Lists that do not apply are empty; `outputs` are the rows, and their scales if quantised."""
    cta, warpgroup = lax.axis_index("cta"), lax.axis_index("warpgroup")
    stages = jnp.int32(plan.stages)
    blocks = jnp.int32(plan.blocks)
    num_items = lax.div(used[0] * blocks - cta + plan.num_ctas - 1, jnp.int32(plan.num_ctas))

    def locate(item: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Tile, column block and expert of a work item."""
        index = cta + item * plan.num_ctas
        # A bundle of n tiles has n * blocks items, as many as its tiles separately: so this is one of them.
        anchor = lax.div(index, blocks)
        expert, first, size = table[anchor, 0], table[anchor, 1], table[anchor, 2]
        local = index - first * blocks
        return first + lax.rem(local, size), lax.div(local, size), expert

    @pl.when(warpgroup < 2)
    def _multiply() -> None:
        # 3 warpgroups start with 168 registers a thread each: 2 * 232 + 40 = 504 = 3 * 168.
        plgpu.set_max_registers(232, action="increase")
        row_group = warpgroup if plan.row_groups == 2 else 0
        column_group = 0 if plan.row_groups == 2 else warpgroup
        part = pl.ds(row_group * GROUP_ROWS, GROUP_ROWS)
        columns = pl.ds(column_group * plan.columns, plan.columns)
        shape = (GROUP_ROWS, plan.columns)

        def operands(slot: jax.Array) -> list[tuple[Ref, Ref]]:
            return [
                (rows_smem.at[slot, part], weights_smem.at[slot, index, columns]) for index in range(plan.num_weights)
            ]

        def release(slot: jax.Array) -> None:
            # The products have been waited for: the tensor cores have read the buffer.
            target.finish_reads()
            plgpu.barrier_arrive(free.at[slot])

        def multiply(start: jax.Array) -> tuple[jax.Array, ...]:
            def wait(step: jax.Array) -> list[tuple[Ref, Ref]]:
                slot = lax.rem(start + step, stages)
                plgpu.barrier_wait(full.at[slot])
                return operands(slot)

            return target.sum_dots(
                plan.steps, plan.num_weights, shape, wait, lambda step: release(lax.rem(start + step, stages))
            )

        def multiply_scaled(start: jax.Array, expert: jax.Array, block: jax.Array) -> tuple[jax.Array, ...]:
            first_factor = (expert * plan.blocks + block) * plan.steps

            def factors_of(step: jax.Array | int) -> tuple[jax.Array, ...]:
                return tuple(scales[first_factor + step] for scales in weight_scales)

            def add(step: jax.Array, carry: Scaled) -> Scaled:
                sums, factors = carry
                slot = lax.rem(start + step, stages)
                # One step ahead, so that a cache miss does not stall between two products.
                next_factors = factors_of(jnp.minimum(step + 1, plan.steps - 1))
                plgpu.barrier_wait(full.at[slot])
                scale = target.load(row_scales_smem.at[slot, part], WGMMA_ROW)
                new = []
                for index, (left, right) in enumerate(operands(slot)):
                    product = target.dot(left, right)
                    if index == plan.num_weights - 1:
                        release(slot)
                    new.append(sums[index] + product * lax.broadcast_in_dim(scale * factors[index], shape, [0]))
                return tuple(new), next_factors

            zeros = tuple(target.full(shape, 0.0, WGMMA) for _ in range(plan.num_weights))
            return lax.fori_loop(0, plan.steps, add, (zeros, factors_of(0)))[0]

        def row_scale(largest: jax.Array, item: jax.Array) -> jax.Array:
            """Scale of each row from the largest value in this warpgroup's columns."""
            if plan.row_groups == 1:
                # Two alternating buffers: before one is written again, the other warpgroup has passed the barrier in
                # between, and so has read it.
                mine = largest_smem.at[lax.rem(item, jnp.int32(2)), warpgroup]
                other = largest_smem.at[lax.rem(item, jnp.int32(2)), 1 - warpgroup]
                mine[...] = largest
                plgpu.commit_smem()
                plgpu.barrier_arrive(met)
                plgpu.barrier_wait(met)
                largest = jnp.maximum(largest, target.load(other, WGMMA_ROW))
            return jnp.where(largest > TINY, largest * (1 / FP8_MAX), 1.0)

        def store(value: jax.Array, row: jax.Array, column: jax.Array) -> None:
            buffer = out_smem.at[warpgroup]
            # The previous copy must have read the buffer; it need not have arrived yet.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            buffer[...] = value.astype(buffer.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(buffer, outputs[0].at[pl.ds(row, GROUP_ROWS), pl.ds(column, STORE_COLUMNS)])

        def visit(item: jax.Array, _: tuple[()]) -> tuple[()]:
            tile, block, expert = locate(item)
            work = functools.partial(produce, item, tile, block, expert)
            if plan.row_groups == 1:
                work()
                return ()
            # The first rows of a tile hold the pairs: if they are all in the first half, the second has none.
            is_empty = table[tile, 3] <= row_group * GROUP_ROWS
            lax.cond(is_empty, functools.partial(pass_by, item * plan.steps), work)
            return ()

        def pass_by(start: jax.Array) -> None:
            """Takes part in the ring and leaves the tensor cores to the other warpgroup."""

            def step(index: jax.Array, _: tuple[()]) -> tuple[()]:
                slot = lax.rem(start + index, stages)
                plgpu.barrier_wait(full.at[slot])
                plgpu.barrier_arrive(free.at[slot])
                return ()

            lax.fori_loop(0, plan.steps, step, ())

        def produce(item: jax.Array, tile: jax.Array, block: jax.Array, expert: jax.Array) -> None:
            """The products of a work item, and its result."""
            start = item * plan.steps
            sums = multiply_scaled(start, expert, block) if weight_scales else multiply(start)
            row = tile * plan.tile_rows + row_group * GROUP_ROWS
            # In pieces, so that few registers hold the values between the sums and the result.
            offsets = range(0, plan.columns, STORE_COLUMNS)
            pieces = [[total[:, offset : offset + STORE_COLUMNS] for total in sums] for offset in offsets]
            factor = None
            if plan.gated:
                values = [gate / (1 + jnp.exp(-gate)) * up for gate, up in pieces]
            else:
                values = [piece for (piece,) in pieces]
                factor = target.load(row_weights[0].at[pl.ds(row, GROUP_ROWS)], WGMMA_ROW)
            if len(outputs) == 2:
                largest = functools.reduce(jnp.maximum, (jnp.max(jnp.abs(value), axis=1) for value in values))
                scale = row_scale(largest, item)
                factor = 1 / scale

                @pl.when(column_group == 0)
                def _store_scales() -> None:
                    outputs[1][block, pl.ds(row, GROUP_ROWS)] = scale

            for offset, value in zip(offsets, values, strict=True):
                result = value if factor is None else value * lax.broadcast_in_dim(factor, value.shape, [0])
                if len(outputs) == 2:
                    # A quotient may round to just above the largest value, which e4m3 would turn into NaN.
                    result = jnp.clip(result, -FP8_MAX, FP8_MAX)
                store(result, row, block * BLOCK + column_group * plan.columns + offset)

        lax.fori_loop(0, num_items, visit, ())
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == 2)
    def _copy() -> None:
        plgpu.set_max_registers(40, action="decrease")

        def visit(item: jax.Array, _: tuple[()]) -> tuple[()]:
            tile, block, expert = locate(item)
            valid = table[tile, 3]

            def fill(step: jax.Array, _: tuple[()]) -> tuple[()]:
                done = item * plan.steps + step
                slot = lax.rem(done, stages)

                @pl.when(done >= stages)
                def _wait() -> None:
                    plgpu.barrier_wait(free.at[slot])

                k = pl.ds(step * plan.step_columns, plan.step_columns)
                for index, weight in enumerate(weights):
                    plgpu.copy_gmem_to_smem(
                        weight.at[expert, pl.ds(block * BLOCK, BLOCK), k], weights_smem.at[slot, index], full.at[slot]
                    )
                for scales in row_scales:
                    plgpu.copy_gmem_to_smem(
                        scales.at[step, pl.ds(tile * plan.tile_rows, plan.tile_rows)],
                        row_scales_smem.at[slot],
                        full.at[slot],
                    )

                def copy_rows(count: int) -> None:
                    plgpu.copy_gmem_to_smem(
                        rows[0].at[pl.ds(tile * plan.tile_rows, count), k],
                        rows_smem.at[slot, pl.ds(0, count)],
                        full.at[slot],
                    )

                _at_least(valid, plan.tile_rows, copy_rows)
                return ()

            return lax.fori_loop(0, plan.steps, fill, ())

        lax.fori_loop(0, num_items, visit, ())
        total = num_items * plan.steps

        def drain(step: jax.Array, _: tuple[()]) -> tuple[()]:
            plgpu.barrier_wait(free.at[lax.rem(step, stages)])
            return ()

        # No barrier may be in the middle of a phase when the CTA ends.
        lax.fori_loop(jnp.maximum(total - stages, 0), total, drain, ())


def _at_least(valid: jax.Array, tile_rows: int, copy: Callable[[int], None]) -> None:
    """Calls `copy` with a quarter, half or all of `tile_rows`, the smallest that covers `valid` rows.

    The rest of the buffer belongs to other rows, or was never written. It affects only sums of rows without a
    pair: rows of a product are independent.
    """
    counts = tile_rows // 4, tile_rows // 2, tile_rows
    pl.when(valid <= counts[0])(functools.partial(copy, counts[0]))
    pl.when((valid > counts[0]) & (valid <= counts[1]))(functools.partial(copy, counts[1]))
    pl.when(valid > counts[1])(functools.partial(copy, counts[2]))
