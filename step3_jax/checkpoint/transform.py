"""What conversion does to a band: change of dtype, block-FP8 and back, and the error this leaves.

The FP8 scheme is that of `quant` (scale = max|block| / 448, 1 for a block of zeros, round to nearest even). Here it
works on panels of one block row, which stay in the processor's cache, and at the disk's speed: XLA compiles reductions
over blocks, and numpy casts to FP8, ten times slower than this.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float, Shaped, UInt8

from step3_jax.quant import FP8_MAX

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)


@dataclasses.dataclass(frozen=True)
class BandError:
    """How far stored values are from the source's; errors of several bands add up.

    Attributes:
      largest: Largest absolute difference.
      error_squares: Sum of the squared differences.
      value_squares: Sum of the source's squares.
    """

    largest: float = 0.0
    error_squares: float = 0.0
    value_squares: float = 0.0

    @property
    def relative_rms(self) -> float:
        """Root mean square of the error over that of the values."""
        return math.sqrt(self.error_squares / self.value_squares) if self.value_squares else 0.0

    def __add__(self, other: BandError) -> BandError:
        return BandError(
            max(self.largest, other.largest),
            self.error_squares + other.error_squares,
            self.value_squares + other.value_squares,
        )


def cast_band(values: Shaped[np.ndarray, "M R C"], dtype: np.dtype) -> Shaped[np.ndarray, "M R C"]:
    """The values in another plain dtype, through float32, rounded to nearest even."""
    return values.astype(np.float32, copy=False).astype(dtype, copy=False)


def quantise_band(
    values: Float[np.ndarray, "M R C"], block: tuple[int, int]
) -> tuple[Float[np.ndarray, "M R C"], Float[np.ndarray, "M row_blocks column_blocks"]]:
    """Block-FP8 values and float32 scales of a band that starts at a block.

    Raises:
      ValueError: If a value is not finite: its block would be lost.
    """
    matrices, rows, columns = values.shape
    if values.dtype not in (np.float32, ml_dtypes.bfloat16):
        values = values.astype(np.float32)
    out = np.empty(values.shape, FP8)
    scales = np.empty((matrices, -(-rows // block[0]), -(-columns // block[1])), np.float32)
    # One for all panels: fresh memory costs as much as the arithmetic.
    buffer = np.empty((min(block[0], rows), columns), np.float32)
    for matrix in range(matrices):
        for index, start in enumerate(range(0, rows, block[0])):
            panel = values[matrix, start : start + block[0]]
            scale = _scales(panel, block[1])
            scales[matrix, index] = scale
            row = _expand(scale, block[1], columns)
            scaled = buffer[: len(panel)]
            scaled[...] = panel
            # Not in XLA, which multiplies by the reciprocal instead: ties would go the wrong way.
            np.divide(scaled, row, out=scaled)
            codes = np.asarray(_encode(_on_host(scaled)))
            out[matrix, start : start + block[0]] = codes.view(FP8)
    return out, scales


def dequantise_band(
    values: Float[np.ndarray, "M R C"],
    scales: Float[np.ndarray, "M row_blocks column_blocks"],
    block: tuple[int, int],
    dtype: np.dtype,
) -> Float[np.ndarray, "M R C"]:
    """Value * scale of a band that starts at a block, multiplied in float32, in `dtype`."""
    out = np.empty(values.shape, dtype)
    for matrix in range(values.shape[0]):
        for index, start in enumerate(range(0, values.shape[1], block[0])):
            panel = values[matrix, start : start + block[0]]
            row = _expand(scales[matrix, index], block[1], values.shape[2])
            out[matrix, start : start + block[0]] = np.asarray(_decode(_on_host(panel), _on_host(row), dtype))
    return out


def measure_error(
    source: Float[np.ndarray, "M R C"],
    values: Float[np.ndarray, "M R C"],
    scales: Float[np.ndarray, "M row_blocks column_blocks"] | None = None,
    block: tuple[int, int] = (128, 128),
) -> BandError:
    """Difference of stored values (times their scales, if there are any) from the source."""
    total = BandError()
    exact_buffer, error_buffer = np.empty((2, min(block[0], values.shape[1]), values.shape[2]), np.float32)
    for matrix in range(values.shape[0]):
        for index, start in enumerate(range(0, values.shape[1], block[0])):
            rows = slice(start, start + block[0])
            found = values[matrix, rows]
            if scales is not None:
                row = _expand(scales[matrix, index], block[1], values.shape[2])
                found = np.asarray(_decode(_on_host(found), _on_host(row), np.dtype(np.float32)))
            exact, error = exact_buffer[: len(found)], error_buffer[: len(found)]
            exact[...] = source[matrix, rows]
            error[...] = found
            error -= exact
            largest = max(float(error.max()), -float(error.min())) if error.size else 0.0
            total += BandError(largest, _squares(error), _squares(exact))
    return total


def _squares(panel: Float[np.ndarray, "R C"]) -> float:
    return float(np.dot(panel.reshape(-1), panel.reshape(-1)))


def _scales(panel: Float[np.ndarray, "R C"], width: int) -> Float[np.ndarray, "column_blocks"]:
    """The scale of each block of a panel. Positive floats are ordered as their bits are, and NaN is the largest."""
    if panel.dtype == np.float32:
        bits = (panel.view(np.uint32) & 0x7FFFFFFF).max(axis=0)
    else:
        bits = (panel.view(np.uint16) & 0x7FFF).max(axis=0).astype(np.uint32) << 16
    largest = np.maximum.reduceat(bits, np.arange(0, panel.shape[1], width)).view(np.float32)
    if not np.isfinite(largest).all():
        raise ValueError("NaN or infinite values cannot be quantised")
    scale = largest / np.float32(FP8_MAX)
    return np.where(scale > 0, scale, np.float32(1))


def _expand(scale: Float[np.ndarray, "column_blocks"], width: int, columns: int) -> Float[np.ndarray, "C"]:
    return np.repeat(scale, width)[:columns]


def _on_host(array: Shaped[np.ndarray, "..."]) -> Shaped[Array, "..."]:
    """Conversion stays on the CPU where there is an accelerator too: the way there is slower than the work."""
    return jax.device_put(array, jax.local_devices(backend="cpu")[0])


@jax.jit
def _encode(scaled: Float[Array, "R C"]) -> UInt8[Array, "R C"]:
    """Bits in E4M3, rounded to nearest even; scaled values are at most 448 (and a rounding), so none overflows.

    With integers, for XLA's own conversion to FP8 is many times slower on CPUs.
    """
    bits = jax.lax.bitcast_convert_type(scaled, jnp.uint32)
    magnitude = bits & 0x7FFFFFFF
    # Keeps 3 of 23 bits of the mantissa; the exponent's bias goes from 127 to 7.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 the step is 2^-9, as it is of floats from 2^14 on: the addition rounds.
    shifted = jax.lax.bitcast_convert_type(magnitude, jnp.float32) + jnp.float32(2**14)
    small = jax.lax.bitcast_convert_type(shifted, jnp.uint32) & 0xF
    return (jnp.where(magnitude < (121 << 23), small, normal) | ((bits >> 24) & 0x80)).astype(jnp.uint8)


@functools.partial(jax.jit, static_argnums=2)
def _decode(panel: Float[Array, "R C"], scale: Float[Array, "C"], dtype: np.dtype) -> Float[Array, "R C"]:
    return (panel.astype(jnp.float32) * scale).astype(dtype)
