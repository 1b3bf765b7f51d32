"""The kernel: one launch instead of XLA's 3 (bfloat16), 7 (fp8) or 6 (int4).

Two kinds of independent blocks, one warpgroup each:

- 64 rows of queries (one token of 64 heads): bulk copy in, rotation in registers, back into the same buffer, bulk copy
  out. N * H * K * 2 * 2 bytes in all: 8.4 MB for 128 tokens, 2.8 us at 3 TB/s.
- The keys or the values of `ROWS` tokens: rotated (keys), encoded, and copied row by row to their pages, 256 or 512
  bytes each, with their scales. A tile of 64 tokens is computed, as the register layout requires, and
  `ROWS` of it are written: so the writes, which are a chain in each block, are spread over more blocks.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.compat import WGMMA, WGMMA_COLUMN, WGMMA_ROW, Ref, Target, mutating_kernel, swizzled
from pallas_kernels.pages import FP8_MAX, KVPages

HEAD_DIM = 256
HALF = HEAD_DIM // 2
TILE = 64
# Columns processed at once: a whole half of the row, with its cosines and sines, does not fit in the registers.
CHUNK = 64
# Tokens whose rows one block writes.
ROWS = 16


def unsupported(queries: Float[Array, "N H K"], pages: KVPages, query_dtype: jnp.dtype) -> str | None:
    """Why the kernel cannot serve these; None if it can."""
    if query_dtype not in (jnp.bfloat16, jnp.float16):
        return f"rope_cache_write gives queries in bfloat16 or float16, not {query_dtype}"
    if queries.dtype != jnp.bfloat16:
        return f"rope_cache_write rotates bfloat16 queries, but these are {queries.dtype}"
    # Not by `storage`: pages of bits, for CPUs, have the same.
    if pages.keys.dtype not in (jnp.bfloat16, jnp.float8_e4m3fn):
        return f"rope_cache_write writes bfloat16 and fp8 pages, but these are {pages.storage} in {pages.keys.dtype}"
    if queries.shape[2] != HEAD_DIM:
        return f"rope_cache_write supports head size {HEAD_DIM}, but this is {queries.shape[2]}"
    if queries.shape[1] % TILE:
        return f"rope_cache_write needs a multiple of {TILE} query heads, but these are {queries.shape[1]}"
    return None


# References with a memory space exist only inside a jit.
@functools.partial(jax.jit, static_argnames=("key_at", "value_at", "query_dtype", "interpret", "detect_races"))
def rope_cache_write(
    queries: Float[Array, "N H K"],
    keys: Float[Array, "N key_columns"],
    values: Float[Array, "N value_columns"],
    cos: Float[Array, "N half"],
    sin: Float[Array, "N half"],
    pages: KVPages,
    page_ids: Int[Array, " N"],
    slots: Int[Array, " N"],
    first_page: Int[Array, ""] | int = 0,
    *,
    interpret: bool,
    detect_races: bool = False,
    key_at: int = 0,
    value_at: int = 0,
    query_dtype: jnp.dtype | None = None,
) -> tuple[Float[Array, "N H K"], KVPages]:
    """See `api.rope_cache_write`."""
    target = Target(interpret, detect_races)
    num_tokens, num_heads, _ = queries.shape
    if num_tokens == 0:
        return queries.astype(query_dtype or queries.dtype), pages
    tokens = [keys, values, cos, sin]
    if num_tokens < TILE:
        # The tile is read whole.
        tokens = [jnp.pad(array, ((0, TILE - num_tokens), (0, 0))) for array in tokens]
    row_blocks = pl.cdiv(num_tokens, ROWS)
    buffers = [buffer for buffer in pages if buffer is not None]
    refs = [jax.new_ref(buffer, memory_space=plgpu.GMEM) for buffer in buffers]
    rotated = mutating_kernel(
        functools.partial(
            _body,
            target=target,
            num_tokens=num_tokens,
            row_blocks=row_blocks,
            heads_tiles=num_heads // TILE,
            num_pages=pages.keys.shape[0],
            is_scaled=len(buffers) == 4,
            columns=(key_at, value_at),
            query_dtype=query_dtype or queries.dtype,
        ),
        out_type=jax.ShapeDtypeStruct(queries.shape, queries.dtype),
        # The blocks with the longest chain first.
        grid=(2 * row_blocks + num_tokens * (num_heads // TILE),),
        grid_names=("block",),
        scratch_types=[
            plgpu.SMEM((TILE, HEAD_DIM), queries.dtype, transforms=swizzled(queries.dtype)),
            plgpu.SMEM((TILE, HEAD_DIM), pages.keys.dtype),
            plgpu.SMEM((TILE,), jnp.float32),
            plgpu.Barrier(num_arrivals=1),
        ],
        name="rope_cache_write",
        **target.kernel_options(),
    )(
        queries,
        *tokens,
        page_ids.astype(jnp.int32),
        slots.astype(jnp.int32),
        jnp.asarray(first_page, jnp.int32).reshape(1),
        *refs,
    )
    written = [jax.freeze(ref) for ref in refs]
    return lax.bitcast_convert_type(rotated, query_dtype or queries.dtype), KVPages(*written)


def _body(
    queries_ref: Ref,
    keys_ref: Ref,
    values_ref: Ref,
    cos_ref: Ref,
    sin_ref: Ref,
    ids_ref: Ref,
    slots_ref: Ref,
    first_page_ref: Ref,
    *refs: Ref,
    target: Target,
    num_tokens: int,
    row_blocks: int,
    heads_tiles: int,
    num_pages: int,
    is_scaled: bool,
    columns: tuple[int, int],
    query_dtype: jnp.dtype,
) -> None:
    *pages, out_ref, query_tile, row_tile, scale_tile, loaded = refs
    block = lax.axis_index("block")

    def store_query(value: jax.Array) -> jax.Array:
        """In the requested dtype, labelled with the tile's dtype."""
        value = value.astype(query_dtype)
        return value if query_dtype == out_ref.dtype else lax.bitcast_convert_type(value, out_ref.dtype)

    def write_rows(part: jax.Array, source: Ref, buffer: Ref, scales: Ref | None, is_key: bool) -> None:
        first = part * ROWS
        first_page = first_page_ref[0]
        # All rows of the last tile exist: it starts earlier.
        tile = jnp.minimum(lax.div(first, jnp.int32(TILE)) * TILE, jnp.int32(max(num_tokens - TILE, 0)))
        rows = [jnp.minimum(first + offset, num_tokens - 1) for offset in range(ROWS)]
        # Read first, so that these loads overlap.
        places = [(ids_ref[row], slots_ref[row]) for row in rows]
        source = source.at[pl.ds(tile, TILE), pl.ds(columns[0 if is_key else 1], HEAD_DIM)]
        if is_key:
            read = functools.partial(
                _rotated_key, target, source, cos_ref.at[pl.ds(tile, TILE)], sin_ref.at[pl.ds(tile, TILE)]
            )
        else:
            read = functools.partial(_pair, target, source)
        _encode(target, read, row_tile, scale_tile if is_scaled else None)
        # The rows go out through the copy engine, and other threads read the scales than those that wrote them.
        plgpu.commit_smem()
        for offset, (page, slot) in enumerate(places):
            place = page + first_page
            is_kept = (page >= 0) & (place < num_pages) & (first + offset < num_tokens)

            def write(row: jax.Array = rows[offset] - tile, page: jax.Array = place, slot: jax.Array = slot) -> None:
                plgpu.copy_smem_to_gmem(row_tile.at[pl.ds(row, 1)], buffer.at[page, pl.ds(slot, 1)])
                if scales is not None:
                    scales[page, 0, slot] = scale_tile[row]

            pl.when(is_kept)(write)
        plgpu.wait_smem_to_gmem(0)

    @pl.when(block < row_blocks)
    def _write_keys() -> None:
        write_rows(block, keys_ref, pages[0], pages[2] if is_scaled else None, True)

    @pl.when((block >= row_blocks) & (block < 2 * row_blocks))
    def _write_values() -> None:
        write_rows(block - row_blocks, values_ref, pages[1], pages[3] if is_scaled else None, False)

    @pl.when(block >= 2 * row_blocks)
    def _rotate_queries() -> None:
        index = block - 2 * row_blocks
        token = lax.div(index, jnp.int32(heads_tiles))
        heads = pl.ds(lax.rem(index, jnp.int32(heads_tiles)) * TILE, TILE)
        plgpu.copy_gmem_to_smem(queries_ref.at[token, heads], query_tile, loaded)
        plgpu.barrier_wait(loaded)
        for column in range(0, HALF, CHUNK):
            left, right = pl.ds(column, CHUNK), pl.ds(HALF + column, CHUNK)
            cos, sin = (
                lax.broadcast_in_dim(
                    _rounded(target.load(table.at[token, left], WGMMA_COLUMN), out_ref.dtype), (TILE, CHUNK), [1]
                )
                for table in (cos_ref, sin_ref)
            )
            first = target.load(query_tile.at[:, left], WGMMA).astype(jnp.float32)
            second = target.load(query_tile.at[:, right], WGMMA).astype(jnp.float32)
            # Each thread writes only the places that it has read.
            query_tile[:, left] = store_query(first * cos - second * sin)
            query_tile[:, right] = store_query(second * cos + first * sin)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(query_tile, out_ref.at[token, heads])
        plgpu.wait_smem_to_gmem(0)


def _rounded(value: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """float32 with the precision of `dtype`."""
    return value.astype(dtype).astype(jnp.float32)


def _pair(target: Target, source: Ref, column: int) -> tuple[jax.Array, jax.Array]:
    """Columns `column`.. of both halves of the rows, float32 [TILE, CHUNK] each."""
    return tuple(
        target.load(source.at[:, pl.ds(start, CHUNK)], WGMMA).astype(jnp.float32) for start in (column, HALF + column)
    )


def _rotated_key(target: Target, source: Ref, cos_ref: Ref, sin_ref: Ref, column: int) -> tuple[jax.Array, jax.Array]:
    """Like `_pair`, rotated, and rounded like a model's rotation."""
    cos, sin = (
        _rounded(target.load(table.at[:, pl.ds(column, CHUNK)], WGMMA), source.dtype) for table in (cos_ref, sin_ref)
    )
    first, second = _pair(target, source, column)
    return _rounded(first * cos - second * sin, source.dtype), _rounded(second * cos + first * sin, source.dtype)


def _encode(target: Target, read: functools.partial, row_tile: Ref, scale_tile: Ref | None) -> None:
    """Writes the rows that `read` returns to shared memory in stored form, with their scales.

    Reads them twice if there are scales: a row's largest value is known only when all of it has been seen.
    """
    inverse = None
    if scale_tile is not None:
        largest = target.full((TILE,), 0.0, WGMMA_ROW)
        for column in range(0, HALF, CHUNK):
            for part in read(column):
                largest = jnp.maximum(largest, jnp.max(jnp.abs(part), axis=1))
        scale = jnp.where(largest > 0, largest / FP8_MAX, 1.0)
        scale_tile[...] = scale
        inverse = lax.broadcast_in_dim(scale, (TILE, CHUNK), [0])
    for column in range(0, HALF, CHUNK):
        for start, part in zip((column, HALF + column), read(column), strict=True):
            scaled = part if inverse is None else jnp.clip(part / inverse, -FP8_MAX, FP8_MAX)
            row_tile[:, pl.ds(start, CHUNK)] = scaled.astype(row_tile.dtype)
