"""Quantised rows: what a norm hands to the products after it, so that they quantise nothing themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from pallas_kernels.quantise import quantise_rows, scales_to_columns


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Activations in e4m3 with one scale for each 128 columns of a row, flattened over the batch.

    Attributes:
      values: e4m3.
      scales: float32, the scales of a row as a column, N rounded up to 4: the layout "columns" of `pallas_kernels.quantise`,
        of which what is past N may be anything.
      plain: The same rows before they were quantised, if something needs them too (the router).
      dtype: Of the activations that they stand for, and so of what a product makes of them.
    """

    values: Float[Array, "N D"]
    scales: Float[Array, "blocks padded_N"]
    plain: Float[Array, "N D"] | None
    dtype: jnp.dtype = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape


def as_rows(hidden: Float[Array, "*batch D"] | Rows) -> Rows:
    """`hidden` quantised, if it is not."""
    if isinstance(hidden, Rows):
        return hidden
    values, scales = quantise_rows(hidden.reshape(-1, hidden.shape[-1]), scales_layout="columns")
    return Rows(values, scales, None, hidden.dtype)


def as_plain(hidden: Float[Array, "*batch D"] | Rows) -> Float[Array, "*batch D"]:
    """`hidden` as it was before it was quantised.

    Raises:
      ValueError: For rows that are left in their quantised form alone.
    """
    if not isinstance(hidden, Rows):
        return hidden
    if hidden.plain is None:
        raise ValueError(
            "these rows are there in their quantised form alone: let what makes them keep the plain one too"
        )
    return hidden.plain


def map_tokens(rows: Rows, gather: Callable[[Num[Array, "N _"]], Num[Array, "M _"]]) -> Rows:
    """Rows of other tokens. `gather` is applied to arrays whose first axis is the tokens, of unsigned bytes or float32.

    Args:
      rows: Their plain form is left out.
      gather: What becomes of the tokens, for example an exchange between devices. Bytes, since not every exchange knows
        8-bit floats.
    """
    num_rows = rows.shape[0]
    values = gather(jax.lax.bitcast_convert_type(rows.values, jnp.uint8))
    scales = gather(rows.scales[:, :num_rows].T)
    return Rows(jax.lax.bitcast_convert_type(values, rows.values.dtype), scales_to_columns(scales), None, rows.dtype)
