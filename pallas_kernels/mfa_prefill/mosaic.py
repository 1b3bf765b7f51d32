"""The prefill kernel over a paged cache, for Hopper.

A block of threads has 128 rows of the flattened (token, head) axis, all of one sequence: 2 tokens of 64 heads, or 16 of
8. All heads share the keys, so each row needs only a position, the diagonal costs one masked block, and any
chunk or packing of sequences is a table of tiles (see `tile`), computed by a few XLA operations on B numbers: a search
through the sequences in each block of threads would be a chain of loads before the first copy can start.

Two warpgroups compute 64 rows each (see `flash`), a third delivers blocks of 64 keys and values through a ring. With an fp8
cache the third also converts the 8-bit rows to float16, which represents them exactly: the tensor cores take 8-bit
values only transposed.

Bound: a tile computes 4 * 128 * 64 * 256 = 8.4 MFLOP on a block of 64 KiB (bfloat16), 128 FLOPs per byte of L2. Causal
prefill of T tokens is 4 * 64 * 256 * T (T + 1) / 2 FLOPs per layer: 2.2 TFLOP for 8,192 tokens, 2.8 ms at the 800 TFLOP/s
that an H100 sustains; the ring then reads 6.2 TB/s from L2, all blocks of threads from the same pages. In fp8 half of that,
but the 8-bit rows pass shared memory twice more, 288 KiB per block against 192: 2,304 clocks at 128 bytes each against
2,048 of the tensor cores. Not measured on a GPU.

Compiled for sm_90a (jax 0.11.2): 168 registers, nothing spilled with bfloat16, 28 bytes per thread with fp8, the least
among the register splits that a block's pool allows (56 for 224 and 56, 44 for 216 and 72).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import tuning
from pallas_kernels.compat import WGMMA, WGMMA_8BIT, Ref, Target, swizzled
from pallas_kernels.mfa_prefill.flash import COMPUTE_WARPGROUPS, ROWS, Ring, attend, feed
from pallas_kernels.mfa_prefill.tile import make_tiles
from pallas_kernels.pages import KVPages, gather_rows

HEAD_DIM = 256
BLOCK_KEYS = 64
# Columns that are converted at a time: few enough for the registers of the third warpgroup, and a tile of both buffers.
CONVERTED_COLUMNS = 64
# Slots of the ring after a conversion: scales have two places, and with a fourth slot block i's would arrive while those of
# block i - 2 are read (see `_converting`).
MAX_CONVERTED_SLOTS = 3
# Tiles for the 8-bit rows, of 64 bytes per row.
RAW_TRANSFORMS = (plgpu.TilingTransform((8, CONVERTED_COLUMNS)), plgpu.SwizzleTransform(CONVERTED_COLUMNS))
# Registers per thread of the computing warpgroups, and of the third: 2 * 232 + 40 = 504 = 3 * 168, their initial total.
# Requesting more hangs, although a multiprocessor has 512: registers beyond the launch are not available to warpgroups.
REGISTERS = (232, 40)


class Scratch(NamedTuple):
    """Shared memory of a block of threads.

    Attributes:
      rows: Queries, later the output, [2, ROWS, K].
      items, scales: See `flash.Ring`.
      raw: 8-bit rows to be converted into `items`, [raw slots, keys, K].
      rows_full: One for each compute warpgroup.
      full, free, scales_full, turn: See `flash`.
      raw_full: An 8-bit block has arrived.
    """

    rows: Ref
    items: Ref
    rows_full: Ref
    full: Ref
    free: Ref
    turn: Ref
    raw: Ref | None = None
    raw_full: Ref | None = None
    scales: Ref | None = None
    scales_full: Ref | None = None


class Cache(NamedTuple):
    """Pages in device memory, and the last block of each sequence with zeros after its last token.

    The products include every value, even those that no row may see, and zero times NaN is NaN: the last block's values
    come from a copy, of 32 KiB per sequence.
    """

    keys: Ref
    values: Ref
    last_values: Ref
    key_scales: Ref | None = None
    value_scales: Ref | None = None
    last_value_scales: Ref | None = None
    value_factors: Ref | None = None


def unsupported(queries: Float[Array, "N H K"], pages: KVPages) -> str | None:
    """Why the kernel cannot serve; None if it can."""
    num_heads = queries.shape[1]
    if pages.storage == "float32":
        return "the kernel does not support a float32 cache"
    if queries.dtype != jnp.bfloat16:
        return f"the kernel takes bfloat16 queries, not {queries.dtype}"
    if pages.head_dim != HEAD_DIM:
        return f"the kernel is for heads of {HEAD_DIM}, not {pages.head_dim}"
    if num_heads not in (8, 16, 32, 64):
        return f"the kernel is for 8, 16, 32 or 64 heads, not {num_heads}"
    if pages.page_size % BLOCK_KEYS:
        return f"the kernel needs pages of a multiple of {BLOCK_KEYS} tokens, not {pages.page_size}"
    return None


def default_blocks(storage: str) -> dict[str, int]:
    """Slots of the ring, and of the 8-bit rows before it; 32 and 16 KiB each, next to 64 KiB of queries."""
    return {"slots": 3, "raw_slots": 3} if storage == "fp8" else {"slots": 4}


def mfa_prefill(
    queries: Float[Array, "N H K"],
    pages: KVPages,
    table: Int[Array, "B max_pages"],
    query_starts: Int[Array, " starts"],
    lengths: Int[Array, " B"],
    scale: float,
    *,
    interpret: bool = False,
    detect_races: bool = False,
    slots: int | None = None,
    raw_slots: int | None = None,
) -> Float[Array, "N H K"]:
    """See `api.mfa_prefill`.

    Args:
      queries: Like all arguments up to `scale`, as there.
      pages: As there.
      table: As there.
      query_starts: As there.
      lengths: As there.
      scale: As there.
      interpret: Run in the interpreter, on a CPU.
      detect_races: The interpreter looks for unordered accesses.
      slots: Items of the ring, at least 2, with fp8 at most 3; by default the best measured value.
      raw_slots: 8-bit blocks in flight, at least 2; fp8 only.

    Raises:
      ValueError: For more slots than the kernel can order.
    """
    num_tokens, num_heads, head_dim = queries.shape
    if pages.storage == "int4":
        # Decoded once for all rows: for a chunk of 512 tokens the kernel reads a row 256 times from L2, so the one
        # additional write and read in device memory is less than a hundredth of the time.
        pages, table = _decode_pages(pages, table)
    storage = pages.storage
    chosen = tuning.blocks("mfa_prefill", default_blocks(storage), n=num_tokens, h=num_heads, storage=storage)
    slots = slots or chosen["slots"]
    raw_slots = raw_slots or chosen.get("raw_slots", 2)
    if storage == "fp8" and slots > MAX_CONVERTED_SLOTS:
        raise ValueError(f"mfa_prefill over an fp8 cache takes 2 or {MAX_CONVERTED_SLOTS} slots, not {slots}")
    tile_tokens = COMPUTE_WARPGROUPS * ROWS // num_heads
    missing = max(tile_tokens - num_tokens, 0)
    if missing:
        queries = jnp.pad(queries, ((0, missing), (0, 0), (0, 0)))
    max_keys = table.shape[1] * pages.page_size
    tiles, _ = make_tiles(query_starts, lengths, num_tokens + missing, tile_tokens, max_keys)
    numbers = jnp.stack(tiles, axis=1)
    is_fp8 = storage == "fp8"
    # With fp8 the queries and the output are float16 in shared memory; as arrays they are labelled bfloat16,
    # which costs nothing, while a conversion in XLA would read and write them once more.
    dtype = jnp.dtype(jnp.float16 if is_fp8 else jnp.bfloat16)
    rows = lax.bitcast_convert_type(queries, dtype).reshape(-1, head_dim)
    last_values, last_scales, value_factors = _last_blocks(pages, table, lengths)
    cache = [pages.keys, pages.values, last_values]
    if is_fp8:
        cache += [pages.key_scales, pages.value_scales, last_scales, value_factors]
    target = Target(interpret, detect_races)
    out = plgpu.kernel(
        functools.partial(_body, num_heads=num_heads, scale=scale, num_cache=len(cache), target=target),
        out_type=jax.ShapeDtypeStruct(rows.shape, dtype),
        grid=(numbers.shape[0],),
        grid_names=("tile",),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name="mfa_prefill",
        scratch_types=_scratch(dtype, slots, raw_slots, is_fp8),
        # All other stores are in `_convert`: no thread writes what another reads before its barrier.
        **target.kernel_options(auto_barriers=False),
    )(numbers, table, rows, *cache)
    return lax.bitcast_convert_type(out, queries.dtype).reshape(-1, num_heads, head_dim)[:num_tokens]


def _scratch(dtype: jnp.dtype, slots: int, raw_slots: int, is_fp8: bool) -> list[object]:
    """The fields of `Scratch`, in order."""
    transforms = swizzled(dtype)
    types: list[object] = [
        plgpu.SMEM((COMPUTE_WARPGROUPS, ROWS, HEAD_DIM), dtype, transforms=transforms),
        plgpu.SMEM((slots, BLOCK_KEYS, HEAD_DIM), dtype, transforms=transforms),
        plgpu.Barrier(num_barriers=COMPUTE_WARPGROUPS),
        # One arrival: the copy's, or the warpgroup's that has converted.
        plgpu.Barrier(num_barriers=slots),
        plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=slots),
        plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS),
    ]
    if is_fp8:
        types += [
            plgpu.SMEM((raw_slots, BLOCK_KEYS, HEAD_DIM), jnp.float8_e4m3fn, transforms=RAW_TRANSFORMS),
            plgpu.Barrier(num_barriers=raw_slots),
            plgpu.SMEM((2, 2, BLOCK_KEYS), jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=2),
        ]
    return types


def _body(
    numbers: Ref,
    table: Ref,
    rows: Ref,
    *refs: Ref,
    num_heads: int,
    scale: float,
    num_cache: int,
    target: Target,
) -> None:
    cache, out, scratch = Cache(*refs[:num_cache]), refs[num_cache], Scratch(*refs[num_cache + 1 :])
    tile, warpgroup = lax.axis_index("tile"), lax.axis_index("warpgroup")
    sequence, first, position, begin, end, num_keys, length = (numbers[tile, column] for column in range(7))
    num_blocks = lax.div(num_keys + (BLOCK_KEYS - 1), jnp.int32(BLOCK_KEYS))
    ring = Ring(scratch.items, scratch.full, scratch.free, scratch.scales, scratch.scales_full)

    @pl.when(warpgroup < COMPUTE_WARPGROUPS)
    def _compute() -> None:
        plgpu.set_max_registers(REGISTERS[0], action="increase")
        own = scratch.rows.at[warpgroup]
        tokens = ROWS // num_heads
        offset = warpgroup * tokens
        start = (first + offset) * num_heads
        plgpu.copy_gmem_to_smem(rows.at[pl.ds(start, ROWS)], own, scratch.rows_full.at[warpgroup])
        plgpu.barrier_wait(scratch.rows_full.at[warpgroup])
        if scratch.raw is not None:
            _convert(target, own, own, jnp.dtype(jnp.bfloat16))
        # All rows see the keys up to the first row's position.
        own_position = position + offset
        num_plain = jnp.clip(lax.div(own_position + 1, jnp.int32(BLOCK_KEYS)), 0, num_blocks)

        def hide(scores: jax.Array, block: jax.Array) -> jax.Array:
            # Row r belongs to token r / num_heads: key <= position + r / num_heads, without the division.
            key = target.iota(scores.shape, 1, WGMMA)
            row = target.iota(scores.shape, 0, WGMMA)
            seen = key * num_heads <= row + (own_position - block * BLOCK_KEYS) * num_heads
            return jnp.where(seen, scores, -jnp.inf)

        factor = None if cache.value_factors is None else cache.value_factors[sequence]
        output = attend(target, own, ring, scratch.turn, warpgroup, num_blocks, num_plain, hide, scale, factor)
        # This warp has waited for its last product; once the whole warpgroup has, nothing reads the queries any more.
        plgpu.commit_smem()
        output = output.astype(jnp.bfloat16)
        own[...] = output if scratch.raw is None else lax.bitcast_convert_type(output, own.dtype)
        plgpu.commit_smem()
        for token in range(tokens):

            @pl.when((offset + token >= begin) & (offset + token < end))
            def _store(token: int = token) -> None:
                source = own.at[pl.ds(token * num_heads, num_heads)]
                plgpu.copy_smem_to_gmem(source, out.at[pl.ds(start + token * num_heads, num_heads)])

        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == COMPUTE_WARPGROUPS)
    def _load() -> None:
        plgpu.set_max_registers(REGISTERS[1], action="decrease")
        last_block = lax.div(length - 1, jnp.int32(BLOCK_KEYS))
        per_page = cache.keys.shape[1] // BLOCK_KEYS

        def copy(block: jax.Array, part: int, destination: Ref, barrier: Ref) -> None:
            """Loads the rows of a block, or their scales."""
            is_scale = len(destination.shape) == 1
            source, last = (
                ((cache.key_scales, cache.value_scales)[part], cache.last_value_scales)
                if is_scale
                else ((cache.keys, cache.values)[part], cache.last_values)
            )

            def copy_page() -> None:
                page = table[sequence, lax.div(block, jnp.int32(per_page))]
                within = pl.ds(lax.rem(block, jnp.int32(per_page)) * BLOCK_KEYS, BLOCK_KEYS)
                chosen = source.at[page, 0, within] if is_scale else source.at[page, within]
                plgpu.copy_gmem_to_smem(chosen, destination, barrier)

            if part == 0:
                copy_page()
                return
            pl.when(block != last_block)(copy_page)

            @pl.when(block == last_block)
            def _copy_last() -> None:
                plgpu.copy_gmem_to_smem(last.at[sequence], destination, barrier)

        def load(block: jax.Array, part: int, slot: jax.Array) -> None:
            copy(block, part, ring.items.at[slot], ring.full.at[slot])

        feed(ring, num_blocks, load if scratch.raw is None else _converting(scratch, copy, num_blocks, target))


def _converting(
    scratch: Scratch,
    copy: Callable[[jax.Array, int, Ref, Ref], None],
    num_blocks: jax.Array,
    target: Target,
) -> Callable[[jax.Array, int, jax.Array], None]:
    """`feed`'s `load` for 8-bit rows: copies run ahead, and each is converted to float16 when a slot of the ring is free."""
    raw_slots = scratch.raw.shape[0]
    ahead = raw_slots - 1

    def fetch(block: jax.Array, part: int) -> None:
        slot = lax.rem(2 * block + part, jnp.int32(raw_slots))

        @pl.when(block < num_blocks)
        def _copy() -> None:
            copy(block, part, scratch.raw.at[slot], scratch.raw_full.at[slot])

    for item in range(ahead):
        fetch(jnp.int32(item // 2), item % 2)

    def load(block: jax.Array, part: int, slot: jax.Array) -> None:
        if part == 0:
            # Block i's scales replace block i - 2's, which are read until its values, item 2 i - 3, are
            # released: those were waited for, since this slot of 3 was theirs, or of 2 that of a later item.
            pair = lax.rem(block, jnp.int32(2))
            for which in (0, 1):
                copy(block, which, scratch.scales.at[pair, which], scratch.scales_full.at[pair])
        # The slot for the copy ahead was read out for the item before this one, and `_convert` ends with a barrier.
        fetch(block + (part + ahead) // 2, (part + ahead) % 2)
        raw_slot = lax.rem(2 * block + part, jnp.int32(raw_slots))
        plgpu.barrier_wait(scratch.raw_full.at[raw_slot])
        _convert(target, scratch.raw.at[raw_slot], scratch.items.at[slot])
        plgpu.barrier_arrive(scratch.full.at[slot])

    return load


def _convert(target: Target, source: Ref, destination: Ref, stored_as: jnp.dtype | None = None) -> None:
    """Writes float16 for tensor cores to read; `stored_as`: the dtype that the bits of `source` are."""
    for column in range(0, HEAD_DIM, CONVERTED_COLUMNS):
        columns = pl.ds(column, CONVERTED_COLUMNS)
        # A thread writes where it has read, in case both are the same buffer.
        values = target.load(source.at[:, columns], WGMMA_8BIT if stored_as is None else WGMMA)
        if stored_as is not None:
            values = lax.bitcast_convert_type(values, stored_as).astype(jnp.float32)
        destination[:, columns] = values.astype(jnp.float16)
    # Tensor cores use another memory proxy; this makes the writes visible to it, and waits for all threads.
    plgpu.commit_smem()


def _last_blocks(
    pages: KVPages, table: Int[Array, "B max_pages"], lengths: Int[Array, " B"]
) -> tuple[Array, Array | None, Array | None]:
    """The values of each sequence's last block, [B, keys, K], with zeros after its end; with scales also those, [B, keys],
    and 1 / the largest of them, [B].
    """
    per_page = pages.page_size // BLOCK_KEYS
    block = jnp.clip((lengths - 1) // BLOCK_KEYS, 0, table.shape[1] * per_page - 1)
    page = jnp.take_along_axis(table, (block // per_page)[:, None], axis=1)[:, 0]
    slots = (block % per_page)[:, None] * BLOCK_KEYS + jnp.arange(BLOCK_KEYS)
    is_there = block[:, None] * BLOCK_KEYS + jnp.arange(BLOCK_KEYS) < lengths[:, None]
    values = jnp.where(is_there[:, :, None], pages.values[page[:, None], slots], jnp.zeros((), pages.values.dtype))
    if pages.value_scales is None:
        return values, None, None
    scales = jnp.where(is_there, pages.value_scales[page[:, None], 0, slots], 0.0)
    largest = jnp.max(scales, axis=1)
    return values, scales, jnp.where(largest > 0, 1.0 / largest, 1.0)


def _decode_pages(pages: KVPages, table: Int[Array, "B max_pages"]) -> tuple[KVPages, Int[Array, "B max_pages"]]:
    """The table's pages, decoded to bfloat16 in its order, and their new table."""
    keys, values = (
        rows.reshape(table.size, pages.page_size, -1) for rows in gather_rows(pages, table, jnp.dtype(jnp.bfloat16))
    )
    return KVPages(keys, values), jnp.arange(table.size, dtype=jnp.int32).reshape(table.shape)
