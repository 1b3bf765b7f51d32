"""Cuts packed sequences into tiles of query tokens; no tile holds tokens of two sequences."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int


class Tiles(NamedTuple):
    """Tiles of `tile_tokens` tokens each, the longest contexts of a sequence first; `int32[tiles]` each.

    A tile that would extend beyond the last token is moved back to end with it, so `first` may be before its sequence;
    only the tokens `first + begin` to `first + end` are its own. Tiles after the last one are empty: begin = end.

    Attributes:
      sequence: Row of the page table.
      first: First token of the tile in the packed batch.
      position: Position of that token in its sequence; negative before the sequence's start.
      begin, end: Which of the tile's tokens are its own.
      num_keys: Cached tokens that its last own token sees.
      length: Cached tokens of the sequence.
    """

    sequence: Int[Array, " tiles"]
    first: Int[Array, " tiles"]
    position: Int[Array, " tiles"]
    begin: Int[Array, " tiles"]
    end: Int[Array, " tiles"]
    num_keys: Int[Array, " tiles"]
    length: Int[Array, " tiles"]


def make_tiles(
    query_starts: Int[Array, " starts"], lengths: Int[Array, " B"], num_tokens: int, tile_tokens: int, max_keys: int
) -> tuple[Tiles, Int[Array, ""]]:
    """Tiles that cover all `num_tokens` tokens, and how many of them there are.

    The tokens after the last sequence count as one more sequence that sees no keys, so that they become zeros.

    Args:
      query_starts: B + 1 row numbers: sequence b has the tokens query_starts[b] to query_starts[b + 1].
      lengths: Cached tokens of each sequence, including these.
      num_tokens: Tokens of the packed batch, at least `tile_tokens`.
      tile_tokens: Tokens of a tile.
      max_keys: Bound of `num_keys`: the rows that the page table has room for.
    """
    starts = jnp.append(query_starts.astype(jnp.int32), num_tokens)
    lengths = jnp.append(lengths.astype(jnp.int32), 0)
    num_sequences = lengths.shape[0]
    counts = starts[1:] - starts[:-1]
    tile_counts = -(-counts // tile_tokens)
    tile_ends = jnp.cumsum(tile_counts)
    total = tile_ends[-1]
    # With n tokens in s sequences, each tile except the last of a sequence is full.
    max_tiles = (num_tokens + num_sequences * (tile_tokens - 1)) // tile_tokens
    index = total - 1 - jnp.arange(max_tiles, dtype=jnp.int32)
    # searchsorted over this few sequences is one comparison and a sum.
    sequence = jnp.minimum(jnp.sum(tile_ends <= index[:, None], axis=1, dtype=jnp.int32), num_sequences - 1)
    start, count, length = starts[sequence], counts[sequence], lengths[sequence]
    own = start + (index - tile_ends[sequence] + tile_counts[sequence]) * tile_tokens
    own = jnp.where(index >= 0, own, 0)
    stop = jnp.where(index >= 0, jnp.minimum(own + tile_tokens, start + count), 0)
    first = jnp.clip(own, 0, num_tokens - tile_tokens)
    position = length - count + first - start
    last = length - count + stop - start
    num_keys = jnp.where(stop > own, jnp.clip(last, 0, jnp.minimum(length, max_keys)), 0)
    row = jnp.minimum(sequence, num_sequences - 2)
    return Tiles(row, first, position, own - first, stop - first, num_keys, length), total
