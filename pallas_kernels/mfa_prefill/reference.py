"""Attention in plain JAX: the definition of the kernels, and the path without a GPU.

Memory does not grow with the square of the length: queries go in tiles, and a tile sees the cache in blocks of keys
with a running softmax (Milakov and Gimelshein, arXiv 1805.02867) or, without a cache, all keys at once. Each block is
two matrix products, large enough to keep a CPU's matrix units busy.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.mfa_prefill.tile import make_tiles
from pallas_kernels.pages import KVPages, decode_rows

# Rows (tokens times heads) of a tile and keys of a block: the scores of a block take 1 MiB, which stays in a core's cache,
# and little is computed above the diagonal. Twice the keys are 3 % faster at 4,096 tokens and 10 % slower at 1,024.
TILE_ROWS = 2048
BLOCK_KEYS = 128
# Bytes of the scores of a tile in `dense_attention`.
DENSE_SCORE_BYTES = 64 << 20
# Means "no key seen yet": finite, so that the difference of two of them is zero.
LOWEST = -1e30


def mfa_prefill(
    queries: Float[Array, "N H K"],
    pages: KVPages,
    table: Int[Array, "B max_pages"],
    query_starts: Int[Array, " starts"],
    lengths: Int[Array, " B"],
    scale: float,
) -> Float[Array, "N H K"]:
    """See `api.mfa_prefill`."""
    num_tokens, num_heads, head_dim = queries.shape
    tile_tokens = max(1, min(num_tokens, TILE_ROWS // num_heads))
    max_keys = table.shape[1] * pages.page_size
    tiles, num_tiles = make_tiles(query_starts, lengths, num_tokens, tile_tokens, max_keys)
    block_pages = max(1, min(BLOCK_KEYS // pages.page_size, table.shape[1]))
    block_keys = block_pages * pages.page_size
    # Whole blocks of page ids; the pages of the added ones are never seen.
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % block_pages)))
    rows = tile_tokens * num_heads

    def attend_tile(index: Int[Array, ""], out: Float[Array, "N H K"]) -> Float[Array, "N H K"]:
        tile = jax.tree.map(lambda column: column[index], tiles)
        own = lax.dynamic_slice_in_dim(queries, tile.first, tile_tokens).reshape(rows, head_dim)
        token = jnp.arange(rows, dtype=jnp.int32) // num_heads
        positions = tile.position + token

        def add_block(block: Int[Array, ""], carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            output, largest, total = carry
            first_key = block * block_keys
            ids = lax.dynamic_slice(table, (tile.sequence, block * block_pages), (1, block_pages))[0]
            keys, values = (
                _read_block(part, scales, ids, queries.dtype)
                for part, scales in ((pages.keys, pages.key_scales), (pages.values, pages.value_scales))
            )
            key_positions = first_key + jnp.arange(block_keys, dtype=jnp.int32)
            # An unwritten row may hold anything, and zero times NaN is NaN.
            values = jnp.where((key_positions < tile.length)[:, None], values, 0)
            scores = jnp.einsum("QK,SK->QS", own, keys, preferred_element_type=jnp.float32) * scale
            seen = (key_positions <= positions[:, None]) & (key_positions < tile.num_keys)
            scores = jnp.where(seen, scores, -jnp.inf)
            new_largest = jnp.maximum(largest, jnp.max(scores, axis=1))
            weights = jnp.exp(scores - new_largest[:, None])
            kept = jnp.exp(largest - new_largest)
            total = total * kept + jnp.sum(weights, axis=1)
            added = jnp.einsum("QS,SK->QK", weights.astype(queries.dtype), values, preferred_element_type=jnp.float32)
            return output * kept[:, None] + added, new_largest, total

        empty = (
            jnp.zeros((rows, head_dim), jnp.float32),
            jnp.full((rows,), LOWEST, jnp.float32),
            jnp.zeros((rows,), jnp.float32),
        )
        num_blocks = (tile.num_keys + block_keys - 1) // block_keys
        output, _, total = lax.fori_loop(0, num_blocks, add_block, empty)
        output = output / jnp.where(total > 0, total, 1.0)[:, None]
        shape = (tile_tokens, num_heads, head_dim)
        other = lax.dynamic_slice_in_dim(out, tile.first, tile_tokens)
        offset = jnp.arange(tile_tokens, dtype=jnp.int32)
        is_own = (offset >= tile.begin) & (offset < tile.end)
        output = jnp.where(is_own[:, None, None], output.reshape(shape).astype(out.dtype), other)
        return lax.dynamic_update_slice_in_dim(out, output, tile.first, 0)

    return lax.fori_loop(0, num_tiles, attend_tile, jnp.zeros_like(queries))


def _read_block(
    stored: Array, scales: Array | None, ids: Int[Array, " block_pages"], dtype: jnp.dtype
) -> Float[Array, "S K"]:
    """Rows of these pages, decoded, in order."""
    picked = None if scales is None else jnp.swapaxes(_take(scales, ids), -1, -2)
    decoded = decode_rows(_take(stored, ids), picked, dtype)
    return decoded.reshape(-1, decoded.shape[-1])


def _take(pages: Array, ids: Int[Array, " block_pages"]) -> Array:
    """pages[ids]. XLA:CPU widens 8- and 16-bit floats, and would widen all pages before the loop if
    they did not depend on the ids.
    """
    pages, ids = lax.optimization_barrier((pages, ids))
    return pages[ids]


def dense_attention(
    queries: Float[Array, "B T H K"],
    keys: Float[Array, "B S G K"],
    values: Float[Array, "B S G K"],
    lengths: Int[Array, " B"] | None,
    causal: bool,
    scale: float,
) -> Float[Array, "B T H K"]:
    """See `api.dense_attention`."""
    batch, num_queries, num_heads, head_dim = queries.shape
    num_keys, groups = keys.shape[1], keys.shape[2]
    query_bytes = batch * num_heads * num_keys * 4
    tile = max(1, min(num_queries, DENSE_SCORE_BYTES // max(query_bytes, 1)))
    key_positions = jnp.arange(num_keys, dtype=jnp.int32)
    if lengths is not None:
        values = jnp.where((key_positions < lengths[:, None])[:, :, None, None], values, 0)
    grouped = queries.reshape(batch, num_queries, groups, -1, head_dim)

    def attend(own: Float[Array, "B t G R K"], first: Int[Array, ""] | int) -> Float[Array, "B t G R K"]:
        scores = jnp.einsum("BTGRK,BSGK->BGRTS", own, keys, preferred_element_type=jnp.float32) * scale
        if causal or lengths is not None:
            positions = first + jnp.arange(own.shape[1], dtype=jnp.int32)
            seen = (key_positions <= positions[:, None]) | (not causal)
            end = num_keys if lengths is None else lengths[:, None, None]
            seen = (seen[None] & (key_positions < end))[:, None, None]
            largest = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True, where=seen, initial=LOWEST), LOWEST)
            weights = jnp.where(seen, jnp.exp(scores - largest), 0.0)
            total = jnp.sum(weights, axis=-1, keepdims=True)
            weights = weights / jnp.where(total > 0, total, 1.0)
        else:
            weights = jax.nn.softmax(scores, axis=-1)
        weights = weights.astype(values.dtype)
        out = jnp.einsum("BGRTS,BSGK->BTGRK", weights, values, preferred_element_type=jnp.float32)
        return out.astype(queries.dtype)

    if tile == num_queries:
        return attend(grouped, 0).reshape(queries.shape)

    def attend_tile(index: Int[Array, ""], out: Float[Array, "B T G R K"]) -> Float[Array, "B T G R K"]:
        # The last tile is moved back to end with the last query; its first rows are recomputed identically.
        first = jnp.minimum(index * tile, num_queries - tile)
        own = lax.dynamic_slice_in_dim(grouped, first, tile, axis=1)
        return lax.dynamic_update_slice_in_dim(out, attend(own, first), first, 1)

    return lax.fori_loop(0, -(-num_queries // tile), attend_tile, jnp.zeros_like(grouped)).reshape(queries.shape)
