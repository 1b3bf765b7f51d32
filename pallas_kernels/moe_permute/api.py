"""Sorts the rows of a mixture of experts by expert, and sums them back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from pallas_kernels.common import Implementation, dispatch
from pallas_kernels.moe_permute import mosaic, reference
from pallas_kernels.moe_permute.reference import Permutation


def plan_permutation(
    experts: Int[Array, "N top_k"], *, num_experts: int, first_expert: int = 0, tile_rows: int = 64
) -> Permutation:
    """Gives each (token, choice) pair a row, sorted by expert, so that no tile of rows spans two experts.

    The rows of an expert are in the order of the tokens. Each expert's last tile is padded. Pairs whose expert is not
    in [first_expert, first_expert + num_experts) get no row. Plain XLA whatever the device.

    Args:
      experts: Chosen expert of each pair, numbered over all shards.
      num_experts: Experts of this shard.
      first_expert: The shard's first expert.
      tile_rows: Rows of a tile; `grouped_gate_up` and `grouped_down` have kernels for 64 and 128.

    Raises:
      ValueError: For no tokens, no experts, a negative `first_expert`, or tiles of no rows.
    """
    if experts.size == 0 or num_experts < 1 or first_expert < 0 or tile_rows < 1:
        raise ValueError(
            f"experts of shape {experts.shape}, num_experts {num_experts}, first_expert {first_expert} and tile_rows "
            f"{tile_rows} were given; all sizes must be at least 1 and first_expert at least 0"
        )
    return reference.plan_permutation(experts, num_experts=num_experts, first_expert=first_expert, tile_rows=tile_rows)


def permute_rows(
    array: Num[Array, "N D"], permutation: Permutation, *, implementation: Implementation = "auto"
) -> Num[Array, "R D"]:
    """out[r] = array[token of row r]; rows without a pair may hold anything, including NaN.

    Args:
      array: One row per token, of any dtype of 1, 2 or 4 bytes.
      permutation: From `plan_permutation`.
      implementation: See `common.Implementation`. The kernel writes only rows in use.

    Raises:
      ValueError: If the permutation is for another number of tokens.
      NotImplementedError: If the kernel is requested by name and D is not a multiple of 128, or tiles do not have a
        multiple of 8 rows.
    """
    if permutation.rows.shape[0] != array.shape[0]:
        raise ValueError(
            f"array has {array.shape[0]} rows but the permutation is for {permutation.rows.shape[0]} tokens; "
            "give the permutation of the same tokens"
        )
    unsupported = None
    if array.shape[1] % mosaic.LINE or permutation.tile_rows % mosaic.DEFAULT_BLOCKS["rows"]:
        unsupported = (
            f"the kernel takes rows of a multiple of {mosaic.LINE} columns in tiles of a multiple of 8 rows; "
            f"they are {array.shape[1]} and {permutation.tile_rows}"
        )
    return dispatch(implementation, unsupported, reference.permute_rows, mosaic.permute_rows, array, permutation)


def combine_rows(
    array: Float[Array, "R D"], permutation: Permutation, *, dtype: jax.typing.DTypeLike | None = None
) -> Float[Array, "N D"]:
    """out[n] = sum over the pairs of token n of array[row of the pair]; pairs without a row add nothing.

    Summed in float32, in the order of the choices, whatever the device: the same bits each time. Rows that hold no pair
    are not read. Plain XLA whatever the device: one fusion.

    Args:
      array: One row per pair, already multiplied by the router's weights.
      permutation: From `plan_permutation`.
      dtype: Dtype of the result; that of `array` by default.

    Raises:
      ValueError: If `array` has another number of rows than the permutation.
    """
    if array.shape[0] != permutation.pairs.shape[0]:
        raise ValueError(f"array has {array.shape[0]} rows; the permutation has {permutation.pairs.shape[0]}")
    return reference.combine_rows(array, permutation, jnp.dtype(dtype or array.dtype))


def permute_weights(weights: Float[Array, "N top_k"], permutation: Permutation) -> Float[Array, " R"]:
    """The router's weight of each row, float32; 0 for a row without a pair.

    Raises:
      ValueError: If the permutation is for other pairs.
    """
    if weights.shape != permutation.rows.shape:
        raise ValueError(f"weights are {weights.shape}; the permutation is for pairs {permutation.rows.shape}")
    return reference.permute_weights(weights, permutation)


def permute_scales(scales: Float[Array, "N blocks"], permutation: Permutation) -> Float[Array, "blocks R"]:
    """Scales of quantised rows, `quantise_rows(x)[1]`, in the order of the rows and as columns, for the kernels.

    1 for a row without a pair.

    Raises:
      ValueError: If the permutation is of another number of tokens.
    """
    if scales.shape[0] != permutation.rows.shape[0]:
        raise ValueError(f"scales are for {scales.shape[0]} tokens; the permutation is for {permutation.rows.shape[0]}")
    return reference.permute_scales(scales, permutation)
