"""The order of the rows, their gather and their sum in plain JAX.

The order and the sum stay in XLA even on a GPU. Compiled for an H100, the order is 7 small fusions without a sort (with
`argsort` it would be 11 and 2 copies), and the sum is one fusion that reads each row once.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

# Pairs are ranked by comparing each with all others of its chunk, and chunks by counts: no sort, no scan.
CHUNK = 256
# Tiles of one expert that share a block of weights while it is in the L2 cache. More would evict their rows.
MAX_BUNDLE = 16


class Tiles(NamedTuple):
    """Rows cut into tiles of one expert each.

    Attributes:
      table: For each tile its expert (relative to the shard's first), the first tile of its bundle, the number of
        tiles of the bundle, and the number of rows that hold a pair: they come first in the tile. A bundle is a run of
        up to 16 tiles of one expert.
      used: How many tiles are in use; the rest exist because shapes are static.
    """

    table: Int[Array, "T 4"]
    used: Int[Array, "1"]


class Permutation(NamedTuple):
    """The row of each (token, choice) pair of a shard. R = T * rows of a tile.

    Attributes:
      pairs: Pair of each row, token * top_k + choice; N * top_k for a row without one.
      rows: Row of each pair; R if the pair's expert is not in the shard.
      tiles: See `Tiles`.
    """

    pairs: Int[Array, " R"]
    rows: Int[Array, "N top_k"]
    tiles: Tiles

    @property
    def tile_rows(self) -> int:
        """Rows of a tile."""
        return self.pairs.shape[0] // self.tiles.table.shape[0]

    @property
    def tokens(self) -> Int[Array, " R"]:
        """Token of each row; N for a row without one."""
        return self.pairs // self.rows.shape[1]


def max_tiles(num_pairs: int, num_experts: int, tile_rows: int) -> int:
    """The most tiles that `num_pairs` can take, however they are distributed over the experts; at least 1."""
    return max((num_pairs + min(num_experts, num_pairs) * (tile_rows - 1)) // tile_rows, 1)


def plan_permutation(
    experts: Int[Array, "N top_k"], *, num_experts: int, first_expert: int, tile_rows: int
) -> Permutation:
    """See `api.plan_permutation`."""
    num_tokens, top_k = experts.shape
    num_pairs = experts.size
    num_tiles = max_tiles(num_pairs, num_experts, tile_rows)
    num_rows = num_tiles * tile_rows
    local = experts.reshape(-1).astype(jnp.int32) - first_expert
    is_here = (local >= 0) & (local < num_experts)
    local = jnp.where(is_here, local, num_experts)
    ranks, counts = _rank(local, num_experts)
    tiles_each = -(-counts // tile_rows)
    ids = jnp.arange(num_experts, dtype=jnp.int32)
    starts = jnp.sum(jnp.where(ids[None, :] < ids[:, None], tiles_each[None, :], 0), axis=1)

    rows = jnp.where(is_here, starts[jnp.minimum(local, num_experts - 1)] * tile_rows + ranks, num_rows)
    pairs = jnp.full((num_rows,), num_pairs, jnp.int32)
    pairs = pairs.at[rows].set(jnp.arange(num_pairs, dtype=jnp.int32), mode="drop")

    tile = jnp.arange(num_tiles, dtype=jnp.int32)
    expert = jnp.sum((starts + tiles_each)[None, :] <= tile[:, None], axis=1, dtype=jnp.int32)
    expert = jnp.minimum(expert, num_experts - 1)
    start, count = starts[expert], counts[expert]
    first = start + (tile - start) // MAX_BUNDLE * MAX_BUNDLE
    size = jnp.minimum(MAX_BUNDLE, start + tiles_each[expert] - first)
    valid = jnp.clip(count - (tile - start) * tile_rows, 0, tile_rows)
    table = jnp.stack([expert, first, size, valid], axis=1).astype(jnp.int32)
    used = jnp.sum(tiles_each, dtype=jnp.int32)[None]
    return Permutation(pairs, rows.reshape(num_tokens, top_k).astype(jnp.int32), Tiles(table, used))


def permute_rows(array: Num[Array, "N D"], permutation: Permutation) -> Num[Array, "R D"]:
    """See `api.permute_rows`; rows without a pair are zero."""
    return array.at[permutation.tokens].get(mode="fill", fill_value=0)


def permute_scales(scales: Float[Array, "N blocks"], permutation: Permutation) -> Float[Array, "blocks R"]:
    """See `api.permute_scales`."""
    return scales.T.at[:, permutation.tokens].get(mode="fill", fill_value=1)


def permute_columns(scales: Float[Array, "blocks padded_N"], permutation: Permutation) -> Float[Array, "blocks R"]:
    """Like `permute_scales`, for scales that are columns already: [blocks, N rounded up to 4]."""
    num_tokens = permutation.rows.shape[0]
    return scales[:, :num_tokens].at[:, permutation.tokens].get(mode="fill", fill_value=1)


def permute_weights(weights: Float[Array, "N top_k"], permutation: Permutation) -> Float[Array, " R"]:
    """See `api.permute_weights`."""
    flat = weights.astype(jnp.float32).reshape(-1)
    return flat.at[permutation.pairs].get(mode="fill", fill_value=0)


def point_at(tiles: Tiles, first_matrix: Int[Array, ""] | int) -> Tiles:
    """The same tiles for a stack in which the shard's first expert is matrix `first_matrix`."""
    # A sum with a row, not a write into a column: XLA fuses it with the computation of the table.
    return tiles._replace(table=tiles.table + first_matrix * jnp.array([1, 0, 0, 0], jnp.int32))


def combine_rows(array: Float[Array, "R D"], permutation: Permutation, dtype: jnp.dtype) -> Float[Array, "N D"]:
    """See `api.combine_rows`."""
    # Not a gather in fill mode: its bounds check would be a separate kernel.
    picked = array.at[permutation.rows].get(mode="clip").astype(jnp.float32)
    is_there = permutation.rows < array.shape[0]
    return jnp.sum(jnp.where(is_there[..., None], picked, 0), axis=1).astype(dtype)


def _rank(local: Int[Array, " pairs"], num_experts: int) -> tuple[Int[Array, " pairs"], Int[Array, " E"]]:
    """How many earlier pairs have the same expert, and how many pairs each expert has; `num_experts` means none."""
    num_pairs = local.shape[0]
    num_chunks = -(-num_pairs // CHUNK)
    size = min(CHUNK, num_pairs)
    chunks = jnp.pad(local, (0, num_chunks * size - num_pairs), constant_values=num_experts).reshape(num_chunks, size)
    is_earlier = _is_less(size)[None]
    within = jnp.sum((chunks[:, :, None] == chunks[:, None, :]) & is_earlier, axis=2, dtype=jnp.int32)
    ids = jnp.arange(num_experts, dtype=jnp.int32)
    counts = jnp.sum(chunks[:, :, None] == ids, axis=1, dtype=jnp.int32)
    before = jnp.sum(jnp.where(_is_less(num_chunks)[:, :, None], counts[None], 0), axis=1)
    ranks = within + jnp.take_along_axis(before, jnp.minimum(chunks, num_experts - 1), axis=1)
    return ranks.reshape(-1)[:num_pairs], jnp.sum(counts, axis=0)


def _is_less(size: int) -> Bool[Array, "size size"]:
    """[i, j]: whether j < i."""
    index = jnp.arange(size, dtype=jnp.int32)
    return index[None, :] < index[:, None]
