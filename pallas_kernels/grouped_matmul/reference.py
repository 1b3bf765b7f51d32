"""The products in plain JAX: a loop over the tiles in use, each with its expert's matrices, in float32."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.moe_permute.reference import (
    Tiles,
    combine_rows,
    permute_rows,
    permute_scales,
    permute_weights,
    plan_permutation,
    point_at,
)
from pallas_kernels.quantise import quantise_rows, scales_to_columns, scales_to_rows
from pallas_kernels.storage import BLOCK

# Rows of a tile on a CPU: enough for an efficient matrix product, few enough to waste little on padding.
MIN_TILE_ROWS, MAX_TILE_ROWS = 8, 128

Pair = tuple[jax.Array, jax.Array]


def grouped_gate_up(
    rows: Array | Pair, gate: Array | Pair, up: Array | Pair, tiles: Tiles, *, quantise: bool
) -> Array | Pair:
    """See `api.grouped_gate_up`; the weights are stacks of matrices [G, F, D]. Rows without a pair are zero."""

    def run(block: Float[Array, "rows D"], matrix: Int[Array, ""]) -> Float[Array, "rows F"]:
        gated, inner = (jnp.dot(block, _matrix(stack, matrix).T) for stack in (gate, up))
        return jax.nn.silu(gated) * inner

    inner = _map_tiles(rows, tiles, _values(gate).shape[1], run)
    if quantise:
        values, scales = quantise_rows(inner)
        return values, scales_to_columns(scales)
    return inner.astype(_dtype(rows))


def grouped_down(
    rows: Array | Pair, down: Array | Pair, row_weights: Float[Array, " R"], tiles: Tiles
) -> Float[Array, "R D"]:
    """See `api.grouped_down`; the weights are a stack of matrices [G, D, F]. Rows without a pair are zero."""

    def run(block: Float[Array, "rows F"], matrix: Int[Array, ""]) -> Float[Array, "rows D"]:
        return jnp.dot(block, _matrix(down, matrix).T)

    out = _map_tiles(rows, tiles, _values(down).shape[1], run)
    return (out * row_weights[:, None]).astype(_dtype(rows))


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
) -> Float[Array, "N D"]:
    """See `api.moe_ffn`; the shard's matrices are `num_experts` of each stack, those of `layer`."""
    mean = max(experts.size // all_experts - 1, 0)
    permutation = plan_permutation(
        experts,
        num_experts=num_experts,
        first_expert=first_expert,
        tile_rows=min(max(MIN_TILE_ROWS, 1 << mean.bit_length()), MAX_TILE_ROWS),
    )
    tiles = point_at(permutation.tiles, layer * num_experts)
    is_fp8 = isinstance(gate, tuple)
    if is_fp8:
        values, scales = quantise_rows(x) if isinstance(x, jax.Array) else (x[0], scales_to_rows(x[1], x[0].shape[0]))
        rows = permute_rows(values, permutation), permute_scales(scales, permutation)
    else:
        rows = permute_rows(x, permutation)
    inner = grouped_gate_up(rows, gate, up, tiles, quantise=is_fp8)
    out = grouped_down(inner, down, permute_weights(weights, permutation), tiles)
    return combine_rows(out, permutation, x.dtype if isinstance(x, jax.Array) else out.dtype)


def _map_tiles(
    rows: Array | Pair,
    tiles: Tiles,
    num_columns: int,
    run: Callable[[Float[Array, "rows K"], Int[Array, ""]], Float[Array, "rows columns"]],
) -> Float[Array, "R columns"]:
    """Applies `run` to each tile in use, float32 in and out; rows without a pair, and other tiles, are zero."""
    values = _values(rows)
    num_rows = values.shape[0]
    tile_rows = num_rows // tiles.table.shape[0]

    def step(tile: Int[Array, ""], out: Float[Array, "R columns"]) -> Float[Array, "R columns"]:
        start = tile * tile_rows
        block = lax.dynamic_slice_in_dim(values, start, tile_rows).astype(jnp.float32)
        if isinstance(rows, tuple):
            scales = lax.dynamic_slice_in_dim(rows[1], start, tile_rows, axis=1).T
            block = block * jnp.repeat(scales, BLOCK, axis=1)[:, : block.shape[1]]
        is_valid = jnp.arange(tile_rows)[:, None] < tiles.table[tile, 3]
        result = run(jnp.where(is_valid, block, 0), tiles.table[tile, 0])
        return lax.dynamic_update_slice_in_dim(out, result, start, axis=0)

    return lax.fori_loop(0, tiles.used[0], step, jnp.zeros((num_rows, num_columns), jnp.float32))


def _matrix(stack: Array | Pair, index: Int[Array, ""]) -> Float[Array, "out columns"]:
    """One matrix of a stack, dequantised to float32."""
    values = lax.dynamic_index_in_dim(_values(stack), index, keepdims=False).astype(jnp.float32)
    if not isinstance(stack, tuple):
        return values
    scales = lax.dynamic_index_in_dim(stack[1], index, keepdims=False)
    wide = jnp.repeat(jnp.repeat(scales, BLOCK, axis=0), BLOCK, axis=1)
    return values * wide[: values.shape[0], : values.shape[1]]


def _values(array: Array | Pair) -> Array:
    return array[0] if isinstance(array, tuple) else array


def _dtype(rows: Array | Pair) -> jnp.dtype:
    """The dtype of the results: that of the rows, or bfloat16 for quantised ones."""
    return jnp.dtype(jnp.bfloat16) if isinstance(rows, tuple) else rows.dtype
