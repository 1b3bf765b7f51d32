"""Quantised rows: what a norm passes to the products after it, so that they need not quantise."""

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
        in which entries past N may be anything.
      plain: The same rows before quantisation, if something else needs them (the router).
      dtype: The dtype of the activations that they represent, and so of a product's result.
    """

    values: Float[Array, "N D"]
    scales: Float[Array, "blocks padded_N"]
    plain: Float[Array, "N D"] | None
    dtype: jnp.dtype = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape


def as_rows(hidden: Float[Array, "*batch D"] | Rows) -> Rows:
    """`hidden`, quantised if it is not yet."""
    if isinstance(hidden, Rows):
        return hidden
    values, scales = quantise_rows(hidden.reshape(-1, hidden.shape[-1]), scales_layout="columns")
    return Rows(values, scales, None, hidden.dtype)


def as_plain(hidden: Float[Array, "*batch D"] | Rows) -> Float[Array, "*batch D"]:
    """`hidden` before quantisation.

    Raises:
      ValueError: For rows of which only the quantised form is left.
    """
    if not isinstance(hidden, Rows):
        return hidden
    if hidden.plain is None:
        raise ValueError("only the quantised form of these rows exists: make their norm keep the plain form too")
    return hidden.plain


def map_tokens(rows: Rows, gather: Callable[[Num[Array, "N _"]], Num[Array, "M _"]]) -> Rows:
    """Rows of other tokens. `gather` is applied to arrays of unsigned bytes or float32 whose first axis is the tokens.

    Args:
      rows: The rows, without their plain form.
      gather: Applied to the tokens, for example an exchange between devices. Bytes, since not every exchange supports
        8-bit floats.
    """
    num_rows = rows.shape[0]
    values = gather(jax.lax.bitcast_convert_type(rows.values, jnp.uint8))
    scales = gather(rows.scales[:, :num_rows].T)
    return Rows(jax.lax.bitcast_convert_type(values, rows.values.dtype), scales_to_columns(scales), None, rows.dtype)
