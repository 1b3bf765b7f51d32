"""Packs and unpacks what crosses between the roles: one row of bytes per token, laid out by `layout/payload.py`."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num, UInt8

from pallas_kernels.quantise import FP8, quantise_rows, scales_to_columns, scales_to_rows
from pallas_kernels.storage import BLOCK
from step3_jax.layers.rows import Rows, as_plain
from step3_jax.layout.payload import PayloadSize

_HIDDEN_DTYPES = {"fp8": FP8, "bfloat16": jnp.bfloat16, "float32": jnp.float32}


class PayloadFormat(PayloadSize):
    """Packs and unpacks the rows of both directions."""

    @property
    def output_dtype(self) -> jnp.dtype:
        """The dtype of the values that come back."""
        return jnp.dtype(jnp.float32 if self.payload == "float32" else jnp.bfloat16)

    def pack(
        self,
        normed: Float[Array, "N D"] | Rows,
        experts: Int[Array, "N top_k"] | None = None,
        weights: Float[Array, "N top_k"] | None = None,
    ) -> UInt8[Array, "N row_bytes"]:
        """Attention to FFN.

        Args:
          normed: Tokens after the post-attention norm.
          experts: Expert ids; None in a dense layer.
          weights: Mixing weights; None in a dense layer.
        """
        shape = (normed.shape[0], self.top_k)
        if self.payload == "fp8":
            if isinstance(normed, Rows):
                values, scales = normed.values, scales_to_rows(normed.scales, normed.shape[0])
            else:
                values, scales = quantise_rows(normed)
            parts = [_to_bytes(values), _to_bytes(scales)]
        else:
            parts = [_to_bytes(as_plain(normed).astype(_HIDDEN_DTYPES[self.payload]))]
        experts = jnp.zeros(shape, jnp.int32) if experts is None else experts
        weights = jnp.zeros(shape, jnp.float32) if weights is None else weights
        parts += [_to_bytes(experts.astype(jnp.uint16)), _to_bytes(weights.astype(jnp.float32))]
        return jnp.concatenate(parts, axis=1)

    def unpack(
        self, rows: UInt8[Array, "N row_bytes"], dtype: jax.typing.DTypeLike
    ) -> tuple[Float[Array, "N D"], Int[Array, "N top_k"], Float[Array, "N top_k"]]:
        """The inverse of `pack`, up to FP8 rounding: tokens in `dtype`, expert ids, mixing weights."""
        values, scales, experts, weights = self._split(rows)
        if self.payload == "fp8":
            wide = jnp.repeat(scales, BLOCK, axis=1)[:, : self.hidden_size]
            values = values.astype(jnp.float32) * wide
        return values.astype(dtype), experts.astype(jnp.int32), weights

    def unpack_rows(
        self, rows: UInt8[Array, "N row_bytes"], dtype: jax.typing.DTypeLike
    ) -> tuple[Rows, Int[Array, "N top_k"], Float[Array, "N top_k"]]:
        """The same with the tokens still in FP8, for matrix products that take them so; only for payload fp8."""
        plain, experts, weights = self.unpack(rows, dtype)
        values, scales = self._split(rows)[:2]
        return Rows(values, scales_to_columns(scales), plain, jnp.dtype(dtype)), experts, weights

    def _split(self, rows: UInt8[Array, "N row_bytes"]) -> list[Num[Array, "N columns"]]:
        """Hidden values, their scales, expert ids and weights, as they crossed."""
        fields = (
            (self.hidden_size, jnp.dtype(_HIDDEN_DTYPES[self.payload])),
            (self.num_scales, jnp.dtype(jnp.float32)),
            (self.top_k, jnp.dtype(jnp.uint16)),
            (self.top_k, jnp.dtype(jnp.float32)),
        )
        found, start = [], 0
        for count, field_dtype in fields:
            end = start + count * field_dtype.itemsize
            found.append(_from_bytes(rows[:, start:end], field_dtype))
            start = end
        return found

    def pack_output(self, output: Float[Array, "N D"]) -> UInt8[Array, "N output_bytes"]:
        """FFN to attention."""
        return _to_bytes(output.astype(self.output_dtype))

    def unpack_output(self, rows: UInt8[Array, "N output_bytes"], dtype: jax.typing.DTypeLike) -> Float[Array, "N D"]:
        """The inverse of `pack_output`, in `dtype`."""
        return _from_bytes(rows, self.output_dtype).astype(dtype)


def _to_bytes(array: Num[Array, "N columns"]) -> UInt8[Array, "N bytes"]:
    if array.dtype.itemsize == 1:
        return jax.lax.bitcast_convert_type(array, jnp.uint8)
    # The bytes of a value get their own axis.
    wide = jax.lax.bitcast_convert_type(array, jnp.uint8)
    return wide.reshape(array.shape[0], math.prod(wide.shape[1:]))


def _from_bytes(rows: UInt8[Array, "N bytes"], dtype: jnp.dtype) -> Num[Array, "N columns"]:
    if dtype.itemsize == 1:
        return jax.lax.bitcast_convert_type(rows, dtype)
    return jax.lax.bitcast_convert_type(
        rows.reshape(rows.shape[0], rows.shape[1] // dtype.itemsize, dtype.itemsize), dtype
    )
