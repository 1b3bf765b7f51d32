"""The routed part of a mixture of experts, and its two grouped products."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.common import Implementation, dispatch
from pallas_kernels.grouped_matmul import mosaic, reference
from pallas_kernels.moe_permute.reference import Tiles, point_at
from pallas_kernels.quantise import FP8, scales_shape
from pallas_kernels.storage import BLOCK

# FP8 values and their float32 scales, or an array. For rows: [R, K] and [K/128, R]. For weights: [..., rows, columns]
# and [..., ceil(rows/128), ceil(columns/128)].
Rows = Float[Array, "R K"] | tuple[Float[Array, "R K"], Float[Array, "blocks R"]]
Weights = Float[Array, "..."] | tuple[Float[Array, "..."], Float[Array, "..."]]


def moe_ffn(
    x: Float[Array, "N D"] | tuple[Float[Array, "N D"], Float[Array, "blocks padded_N"]],
    weights: Float[Array, "N top_k"],
    experts: Int[Array, "N top_k"],
    gate: Weights,
    up: Weights,
    down: Weights,
    *,
    first_expert: int = 0,
    all_experts: int | None = None,
    layer: Int[Array, ""] | int | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "N D"]:
    """The routed experts of one layer, or a shard of them.

    out[n] = sum_j weights[n, j] * down_e(silu(gate_e x_n) * (up_e x_n)) over the j whose expert e = experts[n, j] is in
    [first_expert, first_expert + E); the sum of all shards' results is the layer's. Every product and the sum over j
    are in float32. The intermediate values, and each expert's weighted result, are rounded to the dtype of x. With FP8
    weights both are instead quantised before a product (e4m3, a scale for each 128 columns of a row), also by the
    reference, and each expert's result is bfloat16.

    Args:
      x: Tokens after the post-attention norm; for FP8 weights also as e4m3 values and their scales as columns,
        [ceil(D/128), N rounded up to 4], from `norm_quantise`. The result is then bfloat16.
      weights: The router's weights.
      experts: Chosen experts, numbered over all shards.
      gate, up: [E, F, D], or [L, E, F, D] with `layer`; an array of x's dtype, or a pair of e4m3 values and float32
        scales [..., ceil(F/128), ceil(D/128)].
      down: [E, D, F] likewise.
      first_expert: The shard's first expert.
      all_experts: Experts of all shards; affects only block sizes. first_expert + E by default.
      layer: Which layer of stacked weights; may be traced. The stack is not copied.
      implementation: See `common.Implementation`. The kernels support bfloat16 x with weights in bfloat16 or FP8, D and F
        multiples of 128.

    Raises:
      ValueError: If shapes do not fit together, only some weights are quantised, or weights are stacked and
        `layer` is missing or vice versa.
      NotImplementedError: If the kernels are requested by name and cannot serve; the message says why.
    """
    _check_weights(("gate", gate), ("up", up), ("down", down), layer=layer)
    num_experts, width, depth = _values(gate).shape[-3:]
    if _values(up).shape != _values(gate).shape or _values(down).shape[-3:] != (num_experts, depth, width):
        raise ValueError(
            f"gate is {_values(gate).shape}, up {_values(up).shape} and down {_values(down).shape}; "
            "gate and up must be [E, F, D] and down [E, D, F]"
        )
    num_tokens, columns = _values(x).shape
    if columns != depth:
        raise ValueError(f"x has {columns} columns but gate is for {depth}: they must be equal")
    if isinstance(x, tuple) and not isinstance(gate, tuple):
        raise ValueError("x is quantised but the weights are not: give x in their dtype")
    if isinstance(x, tuple) and x[1].shape != scales_shape(x[0].shape, "columns"):
        raise ValueError(
            f"the scales of x are {x[1].shape}; for values {x[0].shape} they must be {scales_shape(x[0].shape, 'columns')}"
        )
    if first_expert < 0:
        raise ValueError(f"first_expert is {first_expert}; it must be at least 0")
    if experts.size == 0:
        return jnp.zeros((num_tokens, columns), jnp.bfloat16 if isinstance(x, tuple) else x.dtype)
    options = {
        "num_experts": num_experts,
        "first_expert": first_expert,
        "all_experts": all_experts or first_expert + num_experts,
    }
    stacks = [_flatten(stack) for stack in (gate, up, down)]
    return dispatch(
        implementation,
        _unsupported(_values(x).dtype, depth, width, gate),
        functools.partial(reference.moe_ffn, **options),
        functools.partial(mosaic.moe_ffn, **options),
        x,
        weights,
        experts,
        jnp.asarray(0 if layer is None else layer, jnp.int32),
        *stacks,
    )


def grouped_gate_up(
    rows: Rows,
    gate: Weights,
    up: Weights,
    tiles: Tiles,
    *,
    layer: Int[Array, ""] | int | None = None,
    quantise: bool = False,
    implementation: Implementation = "auto",
) -> Rows:
    """silu(rows gate_e^T) * (rows up_e^T), where e is the expert of each tile; summed in float32.

    Args:
      rows: R rows in tiles of R / T, from `permute_rows`: bfloat16 (the reference takes any float), or e4m3 values with
        a scale for each 128 columns of a row, as columns: [ceil(D/128), R], from `permute_scales`.
      gate, up: As in `moe_ffn`; quantised if the rows are.
      tiles: From `plan_permutation`.
      layer: As in `moe_ffn`.
      quantise: Whether to quantise the result, for `grouped_down`.
      implementation: As in `moe_ffn`; the kernel takes tiles of 64 and 128 rows.

    Returns:
      [R, F] in the dtype of the rows (bfloat16 for quantised rows), or e4m3 values [R, F] and scales [ceil(F/128), R].
      Rows without a pair may hold anything, including NaN; unused tiles are not written.

    Raises:
      ValueError, NotImplementedError: As `moe_ffn`.
    """
    _check_weights(("rows", rows), ("gate", gate), ("up", up), layer=layer)
    num_experts, width, depth = _values(gate).shape[-3:]
    if _values(up).shape != _values(gate).shape:
        raise ValueError(f"gate is {_values(gate).shape} but up is {_values(up).shape}: they must be equal")
    tile_rows = _check_rows(rows, depth, tiles)
    return dispatch(
        implementation,
        _unsupported(_values(rows).dtype, depth, width, gate, tile_rows),
        functools.partial(reference.grouped_gate_up, quantise=quantise),
        functools.partial(mosaic.grouped_gate_up, quantise=quantise),
        rows,
        _flatten(gate),
        _flatten(up),
        point_at(tiles, _first_matrix(layer, num_experts)),
    )


def grouped_down(
    rows: Rows,
    down: Weights,
    row_weights: Float[Array, " R"],
    tiles: Tiles,
    *,
    layer: Int[Array, ""] | int | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "R D"]:
    """row_weights * (rows down_e^T), where e is the expert of each tile; summed and multiplied in float32.

    Args:
      rows: From `grouped_gate_up`, [R, F].
      down: As in `moe_ffn`; quantised if the rows are.
      row_weights: The router's weights, from `permute_weights`.
      tiles, layer, implementation: As in `grouped_gate_up`.

    Returns:
      [R, D] in the dtype of the rows, bfloat16 for quantised ones, for `combine_rows`. Rows without a pair may hold
      anything, including NaN; unused tiles are not written.

    Raises:
      ValueError, NotImplementedError: As `moe_ffn`.
    """
    _check_weights(("rows", rows), ("down", down), layer=layer)
    num_experts, depth, width = _values(down).shape[-3:]
    tile_rows = _check_rows(rows, width, tiles)
    if row_weights.shape[0] != _values(rows).shape[0]:
        raise ValueError(f"row_weights are {row_weights.shape[0]} for {_values(rows).shape[0]} rows: give one per row")
    return dispatch(
        implementation,
        _unsupported(_values(rows).dtype, width, depth, down, tile_rows),
        reference.grouped_down,
        mosaic.grouped_down,
        rows,
        _flatten(down),
        row_weights.astype(jnp.float32),
        point_at(tiles, _first_matrix(layer, num_experts)),
    )


def _unsupported(
    dtype: jnp.dtype, columns: int, rows: int, weight: Weights, tile_rows: int = mosaic.TILE_ROWS[0]
) -> str | None:
    """Why the kernels cannot serve rows of `dtype` and matrices [rows, columns]; None if they can."""
    if columns % BLOCK or rows % BLOCK:
        return f"the kernels take sizes that are multiples of {BLOCK}; these are {columns} and {rows}"
    if tile_rows not in mosaic.TILE_ROWS:
        return f"the kernels take tiles of {' or '.join(map(str, mosaic.TILE_ROWS))} rows; these are of {tile_rows}"
    if dtype not in (jnp.bfloat16, FP8):
        return f"the kernels take rows in bfloat16 or e4m3; these are {dtype}"
    wanted = FP8 if isinstance(weight, tuple) else jnp.bfloat16
    if _values(weight).dtype != wanted:
        return f"the kernels take weights in bfloat16, or in e4m3 with scales; these are {_values(weight).dtype}"
    return None


def _check_weights(*named: tuple[str, Weights | Rows], layer: Int[Array, ""] | int | None) -> None:
    """Raises ValueError where arrays and pairs are mixed, a stack lacks axes, or scales do not fit."""
    kinds = {name: isinstance(value, tuple) for name, value in named}
    if len(set(kinds.values())) > 1:
        raise ValueError(
            f"{', '.join(name for name in kinds if kinds[name])} are quantised but the others are not: "
            "give pairs (values, scales) for all or none of them"
        )
    num_axes = 3 if layer is None else 4
    for name, value in named:
        if name == "rows":
            continue
        values = _values(value)
        if values.ndim != num_axes:
            raise ValueError(
                f"{name} has {values.ndim} axes; it must have 3 without `layer` and 4, the first of layers, with it"
            )
        if isinstance(value, tuple):
            blocks = (*values.shape[:-2], -(-values.shape[-2] // BLOCK), -(-values.shape[-1] // BLOCK))
            if value[1].shape != blocks:
                raise ValueError(
                    f"the scales of {name} are {value[1].shape}; for values {values.shape} they are {blocks}"
                )


def _check_rows(rows: Rows, width: int, tiles: Tiles) -> int:
    """The rows of a tile; ValueError where the rows do not fit the weights or the tiles."""
    num_rows, columns = _values(rows).shape
    num_tiles = tiles.table.shape[0]
    if columns != width:
        raise ValueError(f"rows have {columns} columns but the weights are for {width}: they must be equal")
    if num_rows % num_tiles:
        raise ValueError(
            f"{num_rows} rows are not a multiple of {num_tiles} tiles: give the tiles of the same permutation"
        )
    if isinstance(rows, tuple) and rows[1].shape != (-(-width // BLOCK), num_rows):
        raise ValueError(f"the scales of the rows are {rows[1].shape}; they must be {(-(-width // BLOCK), num_rows)}")
    return num_rows // num_tiles


def _first_matrix(layer: Int[Array, ""] | int | None, num_experts: int) -> Int[Array, ""]:
    """Where a layer's matrices start in a stack with merged axes of layers and experts."""
    return jnp.asarray(0 if layer is None else layer, jnp.int32) * num_experts


def _flatten(stack: Weights) -> Weights:
    """Merges the axes of layers and experts: a view, nothing is copied."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[-2:]), stack)


def _values(array: Weights | Rows) -> Array:
    return array[0] if isinstance(array, tuple) else array
