"""Reads the tensors of an open checkpoint in the form they are needed in, in parts."""

from __future__ import annotations

import dataclasses
import math

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from step3_jax.checkpoint.buffer import BufferPool, Buffers
from step3_jax.checkpoint.names import SCALE_SUFFIX, is_fp8_tensor, is_linear_tensor, scale_name
from step3_jax.checkpoint.orbax_io import OrbaxCheckpoint
from step3_jax.checkpoint.placement import Band, as_matrices, cut_bands
from step3_jax.checkpoint.quantised import QuantisedParts
from step3_jax.checkpoint.safetensors_io import DTYPES
from step3_jax.checkpoint.shards import Checkpoint
from step3_jax.checkpoint.zarr_array import StoredArray
from step3_jax.layout.weight_form import form_bytes

FP8_DTYPE = "F8_E4M3"
BAND_BYTES = 2**24
# Bytes of a part that is quantised, which is float32 meanwhile.
QUANTISED_BAND_BYTES = 2**22
# Bytes of a part that is cast: it stays in the processor's cache from reading to writing.
PART_BYTES = 2**20
# A table is several times faster than the element-wise cast, and exact.
_FP8_VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class TensorReader:
    """Reads parts of tensors into new memory.

    The copy is deliberate: JAX on CPU may use numpy's memory directly, and a weight must not change, or crash the
    process, when the file changes.

    Attributes:
      checkpoint: The checkpoint to read.
      dtype: The dtype of activations, and of plain tensors.
      block: Rows and columns that share an FP8 scale.
      quantization: How linear weights are held: one of `layout.weight_form.QUANTIZATIONS` but "auto".
      keeps_bfloat16: Whether plain bfloat16 weights of linear layers stay bfloat16, whatever `dtype` is.
    """

    checkpoint: Checkpoint | OrbaxCheckpoint
    dtype: np.dtype
    block: tuple[int, int]
    quantization: str
    keeps_bfloat16: bool = False

    def is_fp8(self, name: str) -> bool:
        return self.checkpoint.tensors[name].dtype == FP8_DTYPE

    def form(self, name: str) -> str:
        """How a parameter is held: "plain", "fp8", "int8" or "int4"; separate scales are plain."""
        if name.endswith(SCALE_SUFFIX):
            return "plain"
        if self.quantization == "stored":
            return "fp8" if self.is_fp8(name) else "plain"
        return self.quantization if self.quantization != "none" and is_fp8_tensor(name) else "plain"

    def is_kept(self, name: str) -> bool:
        """Whether an FP8 tensor stays FP8: values and scales as in the file."""
        return self.form(name) == "fp8" and self.is_fp8(name)

    def is_quantised_here(self, name: str) -> bool:
        """Whether a parameter is quantised while it is read."""
        return self.form(name) != "plain" and not self.is_kept(name)

    def is_unchanged(self, name: str) -> bool:
        """Whether a parameter on the device is the same as in the file."""
        if self.form(name) != "plain":
            return self.is_kept(name)
        return DTYPES[self.checkpoint.tensors[name].dtype] == self.plain_dtype(name)

    def kept_dtype(self, name: str) -> np.dtype:
        """Dtype on the device of an FP8 tensor that stays FP8, or of its scales."""
        return DTYPES[FP8_DTYPE] if self.is_fp8(name) else np.dtype(np.float32)

    def plain_dtype(self, name: str) -> np.dtype:
        """Dtype on the device of a parameter that is held plain."""
        stored = DTYPES[self.checkpoint.tensors[name].dtype]
        is_left = self.keeps_bfloat16 and stored == ml_dtypes.bfloat16 and is_linear_tensor(name)
        return stored if is_left else self.dtype

    def held_bytes(self, name: str) -> int:
        """Bytes of a parameter on the device, including its scales."""
        form, shape = self.form(name), self.checkpoint.tensors[name].shape
        return form_bytes(shape, self.plain_dtype(name).name if form == "plain" else form, self.block)

    def stored(self, name: str, index: tuple[slice | int, ...]) -> Shaped[np.ndarray, "..."]:
        """A part in the file's dtype."""
        return np.array(self.checkpoint.read(name, index))

    def converted(
        self, name: str, index: tuple[slice | int, ...], dtype: np.dtype | None = None
    ) -> Shaped[np.ndarray, "..."]:
        """A part in `dtype`, or the model's; an FP8 tensor is dequantised, multiplied in float32."""
        dtype = self.dtype if dtype is None else dtype
        part = self.checkpoint.read(name, index)
        if not self.is_fp8(name):
            return part.astype(dtype)
        num_rows, num_columns = self.checkpoint.tensors[name].shape[-2:]
        rows = np.arange(num_rows)[index[-2]] // self.block[0]
        columns = np.arange(num_columns)[index[-1]] // self.block[1]
        scales = self.checkpoint.read(scale_name(name), index[:-2]).astype(np.float32)
        values = _FP8_VALUES[part.view(np.uint8)]
        values *= scales[..., rows, :][..., columns]
        return values.astype(dtype, copy=False)

    def cut(self, name: str) -> list[Band]:
        """The bands in which `read_band` and `quantise_band` process a tensor; the latter's start at block boundaries."""
        place, is_quantised = self.checkpoint.places[name], self.is_quantised_here(name)
        max_bytes = QUANTISED_BAND_BYTES if is_quantised else BAND_BYTES
        # tensorstore decodes whole chunks: read each once.
        if isinstance(place, StoredArray):
            max_bytes = max(max_bytes, place.chunk_bytes)
        multiple = self.block[0] if is_quantised else 1
        return cut_bands(place.shape, DTYPES[place.dtype].itemsize, max_bytes=max_bytes, multiple=multiple)

    def quantise_band(self, name: str, band: Band, parts: QuantisedParts) -> int:
        """Reads a band, quantises it and writes it into its place.

        Args:
          name: Name of the tensor.
          band: The part; one of `cut`.
          parts: Values and scales of the whole tensor.

        Returns:
          The bytes read.

        Raises:
          ValueError: If a file is missing, truncated, or cannot be read, or a value is not finite.
        """
        shape = self.checkpoint.tensors[name].shape
        index = (*band.slices, slice(0, as_matrices(shape)[2]))[3 - len(shape) :]
        parts.fill(name, band, self.converted(name, index, np.dtype(np.float32)))
        part = tuple(len(range(*one.indices(size))) for one, size in zip(index, shape, strict=True))
        return math.prod(part) * DTYPES[self.checkpoint.tensors[name].dtype].itemsize

    def read_band(self, name: str, band: Band, whole: Shaped[np.ndarray, "..."], buffers: BufferPool) -> int:
        """Reads a band into its place in an array of the whole tensor, cast to that array's dtype.

        Args:
          name: Name of the tensor.
          band: The part; one of `cut`.
          whole: Array of the tensor's shape, in the tensor's dtype or in the model's.
          buffers: Memory for casts.

        Returns:
          The bytes read.

        Raises:
          ValueError: If a file is missing, truncated, or cannot be read.
        """
        place = self.checkpoint.places[name]
        columns, itemsize = as_matrices(place.shape)[2], DTYPES[place.dtype].itemsize
        stack = whole.reshape(as_matrices(place.shape))
        num_bytes = stack[band.slices].size * itemsize
        if self.is_fp8(name) and whole.dtype != DTYPES[FP8_DTYPE]:
            index = (*band.slices, slice(0, columns))
            stack[band.slices] = self.converted(name, index[3 - len(place.shape) :])
            return num_bytes
        if isinstance(place, StoredArray):
            stack[band.slices] = place.read(band)
            return num_bytes
        try:
            place.start_reading(band)
            with buffers.lend() as own:
                if whole.dtype == DTYPES[place.dtype]:
                    place.read_into(band, stack[band.slices], own)
                    if self.is_fp8(name):
                        check_fp8(str(place.path), name, stack[band.slices], own)
                    return num_bytes
                for part in band.cut(max(columns * itemsize, 1), max_bytes=PART_BYTES):
                    stack[part.slices] = place.read(part, own)
        except OSError as error:
            raise ValueError(f"{error.filename} cannot be read: {error.strerror or error}") from None
        return num_bytes


def check_fp8(source: str, name: str, values: Shaped[np.ndarray, "M R C"], buffers: Buffers) -> None:
    """Refuses FP8 values that are not numbers: the CPU kernels would take them for 480.

    Args:
      source: Where they were read from, for the message.
      name: Name of the tensor.
      values: A contiguous array.
      buffers: Memory to work in.

    Raises:
      ValueError: If one is NaN; E4M3 has no infinity.
    """
    codes = values.reshape(-1).view(np.uint8)
    for start in range(0, codes.size, PART_BYTES):
        part = codes[start : start + PART_BYTES]
        magnitudes = np.bitwise_and(part, 0x7F, out=buffers.take("codes", part.shape, part.dtype))
        if magnitudes.max(initial=0) == 0x7F:
            raise ValueError(f"{source}: tensor {name} has values that are not numbers (FP8 code 0x7f)")
