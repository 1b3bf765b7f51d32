"""Host memory of a weight that is quantised while it is read, band by band."""

from __future__ import annotations

import dataclasses
from typing import cast

import jax
import numpy as np
from jaxtyping import Float, Shaped

from step3_jax.checkpoint.buffer import empty_aligned
from step3_jax.checkpoint.placement import Band, as_matrices
from step3_jax.checkpoint.transform import quantise_band
from step3_jax.layout.tensor import scale_shape
from step3_jax.layout.weight_form import block_of
from step3_jax.quant import BlockScaled, Form, PackedInt4, quantise


@dataclasses.dataclass(frozen=True)
class QuantisedParts:
    """Values and scales of one weight.

    Attributes:
      form: "fp8", "int8" or "int4".
      block: Rows and columns that share a scale.
      num_columns: Columns of the weight; int4 packs them.
      values: Values of the whole weight.
      scales: Scales of the whole weight.
    """

    form: str
    block: tuple[int, int]
    num_columns: int
    values: Shaped[np.ndarray, "*lead rows bytes"]
    scales: Float[np.ndarray, "*lead row_blocks column_blocks"]

    @classmethod
    def empty(cls, form: str, shape: tuple[int, ...], fp8_block: tuple[int, int]) -> QuantisedParts:
        """Memory for a weight of this shape; the system allocates none before it is written to."""
        block = block_of(form, fp8_block) or fp8_block
        # The result of `quantise` for a weight of this shape.
        like = jax.eval_shape(
            lambda weight: quantise(weight, cast(Form, form)).values, jax.ShapeDtypeStruct(shape, np.float32)
        )
        values = empty_aligned(like.shape, np.dtype(like.dtype))
        scales = empty_aligned(scale_shape(shape, block), np.dtype(np.float32))
        return cls(form, block, shape[-1], values, scales)

    def fill(self, name: str, band: Band, weight: Float[np.ndarray, "..."]) -> None:
        """Quantises a band, which starts at a block boundary, into its place.

        Raises:
          ValueError: If a value is not finite: its block would be lost.
        """
        weight = weight.reshape(band.last - band.first, band.stop - band.start, self.num_columns)
        if self.form == "fp8":
            try:
                values, scales = quantise_band(weight, self.block)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        else:
            if not np.isfinite(weight).all():
                raise ValueError(f"{name}: NaN or infinite values cannot be quantised")
            with jax.default_device("cpu"):
                found = _quantise(weight, cast(Form, self.form))
            values, scales = np.asarray(found.values), np.asarray(found.scales)
        _as_stack(self.values)[band.slices] = values
        _as_stack(self.scales)[band.scaled(self.block[0]).slices] = scales

    def place(self, sharding: jax.sharding.Sharding | None) -> BlockScaled | PackedInt4:
        """The weight as JAX has it, in this memory; nothing is copied on a CPU."""
        values, scales = (jax.device_put(part, sharding, may_alias=True) for part in (self.values, self.scales))
        if self.form == "int4":
            return PackedInt4(values, scales, self.num_columns)
        return BlockScaled(values, scales, self.block)


def _as_stack(array: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "M R C"]:
    return array.reshape(as_matrices(array.shape))


_quantise = jax.jit(quantise, static_argnums=1)
