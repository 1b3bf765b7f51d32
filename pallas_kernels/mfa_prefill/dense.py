"""The kernel for attention without a cache, for Hopper: the vision tower's.

A block of threads has 128 query tokens of one head; the rest is as in `mosaic`, with blocks of 128 keys. XLA pads heads of
112 to 128 columns, and tokens to a multiple of 128: Mosaic's copies cut an array into tiles of 8 rows and 64
columns and refuse one that is not a multiple of them (tiles of 16 columns would fit 112, in copies of 32 bytes per row).
For an image of 2,708 tokens, 16 heads of 112, that is 29 MB read and 34 MB written, 21 us at 3 TB/s if it is not fused with
the bias of the projection before it.

Bound: 4 B H T S K FLOPs with K = 128 instead of 112: 60 GFLOP for such an image and layer, 75 us at 800 TFLOP/s.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import tuning
from pallas_kernels.compat import WGMMA, Ref, Target, swizzled
from pallas_kernels.mfa_prefill.flash import COMPUTE_WARPGROUPS, ROWS, Ring, attend, feed

TILE_TOKENS = COMPUTE_WARPGROUPS * ROWS
# Columns of a swizzled tile of shared memory, in 16 bits.
COLUMNS = 64
MAX_HEAD_DIM = 256
DTYPES = (jnp.bfloat16, jnp.float16)
REGISTERS = (232, 40)


def unsupported(queries: Float[Array, "B T H K"], keys: Float[Array, "B S G K"]) -> str | None:
    """Why the kernel cannot serve; None if it can."""
    if queries.dtype not in DTYPES or keys.dtype != queries.dtype:
        return f"the kernel takes bfloat16 or float16, the same for all, not {queries.dtype} and {keys.dtype}"
    if queries.shape[-1] > MAX_HEAD_DIM:
        return f"the kernel is for heads up to {MAX_HEAD_DIM}, not {queries.shape[-1]}"
    return None


def default_blocks(head_dim: int) -> dict[str, int]:
    """Keys of a block and slots of the ring: 128 KiB of them, next to 64 KiB of queries."""
    return {"block_keys": 128 if head_dim <= 128 else 64, "slots": 4}


def dense_attention(
    queries: Float[Array, "B T H K"],
    keys: Float[Array, "B S G K"],
    values: Float[Array, "B S G K"],
    lengths: Int[Array, " B"] | None,
    causal: bool,
    scale: float,
    *,
    interpret: bool = False,
    detect_races: bool = False,
    block_keys: int | None = None,
    slots: int | None = None,
) -> Float[Array, "B T H K"]:
    """See `api.dense_attention`.

    Args:
      queries: Like all arguments up to `scale`, as there.
      keys: As there.
      values: As there.
      lengths: As there.
      causal: As there.
      scale: As there.
      interpret: Run in the interpreter, on a CPU.
      detect_races: The interpreter looks for unordered accesses.
      block_keys: Keys of a block, a multiple of 64; by default the best measured value.
      slots: Items of the ring, at least 2.
    """
    batch, num_queries, num_heads, head_dim = queries.shape
    num_keys = keys.shape[1]
    columns = head_dim + -head_dim % COLUMNS
    chosen = tuning.blocks("dense_attention", default_blocks(columns), t=num_queries, s=num_keys, k=head_dim)
    block_keys, slots = block_keys or chosen["block_keys"], slots or chosen["slots"]
    if lengths is not None:
        is_seen = jnp.arange(num_keys) < lengths[:, None]
        values = jnp.where(is_seen[:, :, None, None], values, jnp.zeros((), values.dtype))
    else:
        lengths = jnp.full((batch,), num_keys, jnp.int32)
    target = Target(interpret, detect_races)
    transforms = swizzled(queries.dtype)
    padded_queries = _pad(queries, TILE_TOKENS, columns)
    num_tiles = padded_queries.shape[1] // TILE_TOKENS
    out = plgpu.kernel(
        functools.partial(_body, causal=causal, scale=scale, target=target),
        out_type=jax.ShapeDtypeStruct(padded_queries.shape, queries.dtype),
        # Consecutive blocks share the keys of a head.
        grid=(num_tiles, num_heads, batch),
        grid_names=("tile", "head", "batch"),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name="dense_attention",
        scratch_types=[
            plgpu.SMEM((COMPUTE_WARPGROUPS, ROWS, columns), queries.dtype, transforms=transforms),
            plgpu.SMEM((slots, block_keys, columns), queries.dtype, transforms=transforms),
            plgpu.Barrier(num_barriers=COMPUTE_WARPGROUPS),
            plgpu.Barrier(num_barriers=slots),
            plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=slots),
            plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS),
        ],
        **target.kernel_options(),
    )(lengths.astype(jnp.int32), padded_queries, _pad(keys, block_keys, columns), _pad(values, block_keys, columns))
    return out[:, :num_queries, :, :head_dim]


def _pad(array: Float[Array, "B T H K"], tokens: int, columns: int) -> Float[Array, "B T2 H K2"]:
    return jnp.pad(array, ((0, 0), (0, -array.shape[1] % tokens), (0, 0), (0, columns - array.shape[3])))


def _body(
    lengths: Ref,
    queries: Ref,
    keys: Ref,
    values: Ref,
    out: Ref,
    rows: Ref,
    items: Ref,
    rows_full: Ref,
    full: Ref,
    free: Ref,
    turn: Ref,
    *,
    causal: bool,
    scale: float,
    target: Target,
) -> None:
    tile, head, sequence = (lax.axis_index(name) for name in ("tile", "head", "batch"))
    warpgroup = lax.axis_index("warpgroup")
    block_keys = items.shape[1]
    length = lengths[sequence]
    end = jnp.minimum(length, (tile + 1) * TILE_TOKENS) if causal else length
    num_blocks = lax.div(end + (block_keys - 1), jnp.int32(block_keys))
    ring = Ring(items, full, free)

    @pl.when(warpgroup < COMPUTE_WARPGROUPS)
    def _compute() -> None:
        plgpu.set_max_registers(REGISTERS[0], action="increase")
        own = rows.at[warpgroup]
        first = tile * TILE_TOKENS + warpgroup * ROWS
        place = (sequence, pl.ds(first, ROWS), head)
        plgpu.copy_gmem_to_smem(queries.at[place], own, rows_full.at[warpgroup])
        plgpu.barrier_wait(rows_full.at[warpgroup])
        # What all rows see.
        seen_by_all = jnp.minimum(length, first + 1) if causal else length
        num_plain = jnp.minimum(lax.div(seen_by_all, jnp.int32(block_keys)), num_blocks)

        def hide(scores: jax.Array, block: jax.Array) -> jax.Array:
            key = target.iota(scores.shape, 1, WGMMA) + block * block_keys
            seen = key < length
            if causal:
                seen = seen & (key <= target.iota(scores.shape, 0, WGMMA) + first)
            return jnp.where(seen, scores, -jnp.inf)

        output = attend(target, own, ring, turn, warpgroup, num_blocks, num_plain, hide, scale)
        # The last product has been waited for, so the queries are no longer read.
        own[...] = output.astype(own.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(own, out.at[place])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == COMPUTE_WARPGROUPS)
    def _load() -> None:
        plgpu.set_max_registers(REGISTERS[1], action="decrease")
        shared_head = lax.div(head, jnp.int32(queries.shape[2] // keys.shape[2]))

        def load(block: jax.Array, part: int, slot: jax.Array) -> None:
            place = (sequence, pl.ds(block * block_keys, block_keys), shared_head)
            plgpu.copy_gmem_to_smem((keys, values)[part].at[place], items.at[slot], full.at[slot])

        feed(ring, num_blocks, load)
