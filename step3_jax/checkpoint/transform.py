"""What conversion does to a band: casts, block-FP8 and back, and the error that results.

The FP8 scheme is the one in `quant` (scale = max|block| / 448, 1 for a block of zeros, round to nearest even). Here it
works on panels of one block row, which stay in the processor's cache, and at the disk's speed: XLA's reductions
over blocks, and numpy's casts to FP8, are ten times slower than this.

Programs get numpy's memory without a copy where it is aligned (see `buffer`); each result is waited for before the
memory is reused.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float, Shaped, UInt8, UInt32

from step3_jax.checkpoint.buffer import empty_aligned
from step3_jax.quant import FP8_MAX

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
# XLA flushes subnormal numbers to zero. With scales of at least this, the lost numbers are zeros in FP8 anyway.
SMALLEST_SCALE = np.float32(2**-100)
_ZERO = np.zeros((), np.uint32)


@dataclasses.dataclass(frozen=True)
class BandError:
    """The error of stored values against the source's; errors of several bands add up.

    Attributes:
      largest: Largest absolute difference.
      error_squares: Sum of squared differences.
      value_squares: Sum of the source's squares.
    """

    largest: float = 0.0
    error_squares: float = 0.0
    value_squares: float = 0.0

    @property
    def relative_rms(self) -> float:
        """Root mean square of the error, relative to that of the values."""
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
    """Block-FP8 values and float32 scales of a band that starts at a block boundary.

    Raises:
      ValueError: If a value is not finite: its block would be lost.
    """
    matrices, rows, columns = values.shape
    if values.dtype not in (np.float32, ml_dtypes.bfloat16):
        values = values.astype(np.float32)
    scales = np.empty((matrices, -(-rows // block[0]), -(-columns // block[1])), np.float32)
    out = empty_aligned(values.shape, FP8)
    for matrix in range(matrices):
        for index, start in enumerate(range(0, rows, block[0])):
            panel = values[matrix, start : start + block[0]]
            scale = scales[matrix, index] = _scales(panel, block[1])
            row = _expand(scale, block[1], columns)
            if scale.min(initial=1) < SMALLEST_SCALE:
                panel = np.divide(panel, row, dtype=np.float32)
                row = np.ones_like(row)
            with jax.default_device("cpu"):
                out[matrix, start : start + block[0]] = np.asarray(_encode(panel, row)).view(FP8)
    return out, scales


def dequantise_band(
    values: Float[np.ndarray, "M R C"],
    scales: Float[np.ndarray, "M row_blocks column_blocks"],
    block: tuple[int, int],
    dtype: np.dtype,
    out: Float[np.ndarray, "M R C"] | None = None,
) -> Float[np.ndarray, "M R C"]:
    """Value * scale of a band that starts at a block boundary, multiplied in float32, as `dtype`; into `out` if given."""
    if out is None:
        out = np.empty(values.shape, dtype)
    for matrix in range(values.shape[0]):
        for index, start in enumerate(range(0, values.shape[1], block[0])):
            panel = values[matrix, start : start + block[0]]
            out[matrix, start : start + block[0]] = _dequantise(panel, scales[matrix, index], block[1], dtype)
    return out


def measure_error(
    source: Float[np.ndarray, "M R C"],
    values: Float[np.ndarray, "M R C"],
    scales: Float[np.ndarray, "M row_blocks column_blocks"] | None = None,
    block: tuple[int, int] = (128, 128),
) -> BandError:
    """Error of stored values (times their scales, if any) against the source."""
    total = BandError()
    for matrix in range(values.shape[0]):
        for index, start in enumerate(range(0, values.shape[1], block[0])):
            rows = slice(start, start + block[0])
            scale = None if scales is None else scales[matrix, index]
            total += _panel_error(source[matrix, rows], values[matrix, rows], scale, block[1])
    return total


def _panel_error(
    source: Float[np.ndarray, "R C"],
    values: Float[np.ndarray, "R C"],
    scale: Float[np.ndarray, "column_blocks"] | None,
    width: int,
) -> BandError:
    if scale is None:
        error = np.abs(np.subtract(values, source, dtype=np.float32))
    else:
        if source.dtype not in (np.float32, ml_dtypes.bfloat16):
            source = source.astype(np.float32)
        with jax.default_device("cpu"):
            row = _expand(scale, width, values.shape[1])
            error = np.asarray(_decode_error(values.view(np.uint8), row, source, _ZERO))
    total = BandError()
    # A few rows at a time, which stay in the processor's cache.
    for start in range(0, len(error), 16):
        part = error[start : start + 16]
        exact = source[start : start + 16].astype(np.float32, copy=False)
        total += BandError(float(part.max(initial=0)), _squares(part), _squares(exact))
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


def _dequantise(
    panel: Float[np.ndarray, "R C"], scale: Float[np.ndarray, "column_blocks"], width: int, dtype: np.dtype
) -> Float[np.ndarray, "R C"]:
    # Conversion stays on the CPU even with an accelerator: the transfer is slower than the work.
    with jax.default_device("cpu"):
        return np.asarray(_decode(panel.view(np.uint8), _expand(scale, width, panel.shape[1]), dtype))


@jax.jit
def _encode(panel: Float[Array, "R C"], row: Float[Array, "C"]) -> UInt8[Array, "R C"]:
    """Bits of panel / row in E4M3, rounded to nearest even; quotients are at most 448 (and a rounding): none overflows.

    With integers, because XLA's own conversion to FP8 is many times slower on CPUs.
    """
    panel = panel.astype(jnp.float32)
    # A divisor that varies, because XLA multiplies by the reciprocal of a repeated one, and ties go the wrong way. (The
    # bits of the value that are joined to it are zero: without its sign it has 31.)
    nothing = _bits(jnp.abs(panel)) >> 31
    bits = _bits(panel / _float(_bits(row) | nothing))
    # Adding the power of two 20 binades above a value rounds it to 3 bits after its leading one. Below 2^-6 the
    # step is 2^-9, the same as just above 2^-6.
    power = jnp.maximum(bits & 0x7F800000, 121 << 23) + (20 << 23)
    steps = _bits(_float(bits & 0x7FFFFFFF) + _float(power)) - power
    # Eight steps from one exponent to the next, and the bias goes from 127 to 7.
    codes = steps + (power >> 20) - (141 << 3)
    return (codes | ((bits >> 24) & 0x80)).astype(jnp.uint8)


@functools.partial(jax.jit, static_argnums=2)
def _decode(codes: UInt8[Array, "R C"], row: Float[Array, "C"], dtype: np.dtype) -> Float[Array, "R C"]:
    """Values of E4M3 times row, multiplied in float32."""
    return (_values(codes) * row).astype(dtype)


@jax.jit
def _decode_error(
    codes: UInt8[Array, "R C"], row: Float[Array, "C"], exact: Float[Array, "R C"], zero: UInt32[np.ndarray, ""]
) -> Float[Array, "R C"]:
    """Absolute difference between the result of `_decode` and the exact values.

    `zero` is 0, which the compiler cannot know: otherwise it would fuse product and difference, and skip a rounding.
    """
    return jnp.abs(_float(_bits(_values(codes) * row) ^ zero) - exact.astype(jnp.float32))


def _values(codes: UInt8[Array, "..."]) -> Float[Array, "..."]:
    """E4M3 as float32. With integers, like `_encode`."""
    magnitude = codes.astype(jnp.uint32) & 0x7F
    normal = _float((magnitude << 20) + (120 << 23))
    values = jnp.where(magnitude < 8, magnitude.astype(jnp.float32) * jnp.float32(2**-9), normal)
    values = jnp.where(magnitude == 0x7F, jnp.float32(jnp.nan), values)
    return _float(_bits(values) | ((codes.astype(jnp.uint32) & 0x80) << 24))


def _bits(values: Float[Array, "..."]) -> UInt32[Array, "..."]:
    return jax.lax.bitcast_convert_type(values, jnp.uint32)


def _float(bits: UInt32[Array, "..."]) -> Float[Array, "..."]:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
