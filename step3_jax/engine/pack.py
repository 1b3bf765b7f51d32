"""From rows on the host to the arrays of a call."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from step3_jax.cache.bucket import bucket
from step3_jax.engine.job import Row
from step3_jax.engine.scheduler import Chunk
from step3_jax.engine.state import DecodeBatch, PrefillBatch
from step3_jax.sampling.batch import SamplingBatch, SamplingRow, sampling_batch
from step3_jax.sampling.params import SamplingParams

MIN_CHUNK_TOKENS = 32
# What stands in a slot that is free.
_IDLE = SamplingRow(SamplingParams(temperature=0.0), 0, (0, 0), ())


def pack_chunk(
    chunks: Sequence[Chunk],
    *,
    max_batch_size: int,
    max_num_batched_tokens: int,
    max_pages: int,
    shards: Sequence[int] | None = None,
    num_shards: int = 1,
    features: Float[Array, "M D"] | None = None,
    feature_rows: Sequence[Int[np.ndarray, " count"]] = (),
) -> PrefillBatch:
    """One array of all tokens, as long as its bucket; rows and table width are always the most there can be.

    Where the cache is in shards, each array is that of one shard behind the other, all of the longest one's bucket.

    Args:
      chunks: What to read.
      max_batch_size: Rows of a shard's table.
      max_num_batched_tokens: Length of a shard's largest bucket.
      max_pages: Width of the table.
      shards: Shard of each chunk; 0 if absent.
      num_shards: Shards there are.
      features: Image features, None without pictures.
      feature_rows: For each chunk the row of `features` of each of its tokens.
    """
    own_shards = [0] * len(chunks) if shards is None else shards
    totals = np.zeros((num_shards,), np.int32)
    for shard, chunk in zip(own_shards, chunks, strict=True):
        totals[shard] += chunk.num_tokens
    length = bucket(int(totals.max()), min(MIN_CHUNK_TOKENS, max_num_batched_tokens), max_num_batched_tokens)
    token_ids = np.zeros((num_shards, length), np.int32)
    starts = np.repeat(totals[:, None], max_batch_size + 1, axis=1)
    lengths = np.zeros((num_shards, max_batch_size), np.int32)
    table = np.zeros((num_shards, max_batch_size, max_pages), np.int32)
    packed_rows = np.full((num_shards, length), -1, np.int32)
    firsts, places = [0] * num_shards, [0] * num_shards
    for index, (shard, chunk) in enumerate(zip(own_shards, chunks, strict=True)):
        start, end = chunk.start, chunk.start + chunk.num_tokens
        place, first = places[shard], firsts[shard]
        starts[shard, place] = first
        token_ids[shard, first : first + chunk.num_tokens] = chunk.row.prompt.token_ids[start:end]
        lengths[shard, place] = end
        table[shard, place, : len(chunk.row.pages)] = chunk.row.pages
        if features is not None:
            packed_rows[shard, first : first + chunk.num_tokens] = feature_rows[index]
        places[shard] += 1
        firsts[shard] += chunk.num_tokens
    return PrefillBatch(
        jnp.asarray(token_ids.reshape(-1)),
        jnp.asarray(starts.reshape(-1)),
        jnp.asarray(lengths.reshape(-1)),
        jnp.asarray(table.reshape(-1, max_pages)),
        features,
        None if features is None else jnp.asarray(packed_rows.reshape(-1)),
    )


def pack_table(slots: Sequence[Row | None], max_pages: int) -> Int[Array, "B width"]:
    """Pages of the rows in slots, as wide as the bucket of the longest."""
    width = bucket(max((len(row.pages) for row in slots if row is not None), default=1), 1, max_pages)
    table = np.zeros((len(slots), width), np.int32)
    for slot, row in enumerate(slots):
        if row is not None:
            table[slot, : len(row.pages)] = row.pages
    return jnp.asarray(table)


def pack_sampling(slots: Sequence[Row | None], vocab_size: int) -> SamplingBatch:
    """Parameters of the rows in slots."""
    rows = [_IDLE if row is None else row.sampling for row in slots]
    return sampling_batch(rows, vocab_size, len(slots))


def pack_decode(
    slots: Sequence[Row | None],
    table: Int[Array, "B width"],
    *,
    page_size: int,
    vocab_size: int,
    has_history: bool,
) -> DecodeBatch:
    """Where the rows in slots stand; those whose prompt is not read yet do nothing.

    Args:
      slots: The rows.
      table: Of `pack_table`.
      page_size: Tokens of a page.
      vocab_size: V.
      has_history: Whether the sampling mode counts tokens.
    """
    batch_size = len(slots)
    last, cached, num_made = (np.zeros((batch_size,), np.int32) for _ in range(3))
    is_active = np.zeros((batch_size,), bool)
    history = np.full((batch_size, table.shape[1] * page_size if has_history else 0), vocab_size, np.int32)
    for slot, row in enumerate(slots):
        if row is None or not row.is_ready:
            continue
        last[slot], cached[slot], num_made[slot] = row.last_token, row.num_cached, len(row.made)
        is_active[slot] = True
        if has_history:
            history[slot, : row.num_cached + 1] = (*row.prompt.token_ids, *row.made)
    # All in one transfer: this is done for every piece of a stream.
    own = (last, cached, num_made, is_active, history if has_history else None)
    last_token, num_cached, num_output, active, tokens = jax.device_put(own)
    return DecodeBatch(last_token, num_cached, num_output, active, table, tokens)
