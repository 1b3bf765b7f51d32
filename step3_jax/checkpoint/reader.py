"""Reading the tensors of an open checkpoint in the dtype they are wanted in, in parts."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from step3_jax.checkpoint.buffer import BufferPool
from step3_jax.checkpoint.names import scale_name
from step3_jax.checkpoint.orbax_io import OrbaxCheckpoint
from step3_jax.checkpoint.placement import Band, as_matrices, cut_bands
from step3_jax.checkpoint.safetensors_io import DTYPES
from step3_jax.checkpoint.shards import Checkpoint
from step3_jax.checkpoint.zarr_array import StoredArray

FP8_DTYPE = "F8_E4M3"
BAND_BYTES = 2**24
# Of what is cast: it stays in the processor's cache from its reading to its writing.
PART_BYTES = 2**20
# A table is several times faster than the element-wise cast, and exact.
_FP8_VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class TensorReader:
    """Reads parts of tensors into memory of their own.

    The copy is on purpose: JAX on CPU may use numpy's memory as it is, and a weight must not change, or crash the
    process, when somebody changes the file.

    Attributes:
      checkpoint: What is read.
      dtype: Of the model.
      block: Rows and columns that share a scale.
      keep_fp8: Whether FP8 tensors stay FP8.
    """

    checkpoint: Checkpoint | OrbaxCheckpoint
    dtype: np.dtype
    block: tuple[int, int]
    keep_fp8: bool

    def is_fp8(self, name: str) -> bool:
        return self.checkpoint.tensors[name].dtype == FP8_DTYPE

    def kept_dtype(self, name: str) -> np.dtype:
        """What an FP8 tensor that stays FP8, or its scales, are on the device."""
        return DTYPES[FP8_DTYPE] if self.is_fp8(name) else np.dtype(np.float32)

    def stored(self, name: str, index: tuple[slice | int, ...]) -> Shaped[np.ndarray, "..."]:
        """A part in the dtype of the file."""
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
        """The bands that `read_band` takes a tensor in."""
        place = self.checkpoint.places[name]
        # What tensorstore decodes, a chunk at a time, is read once.
        max_bytes = max(BAND_BYTES, place.chunk_bytes) if isinstance(place, StoredArray) else BAND_BYTES
        return cut_bands(place.shape, DTYPES[place.dtype].itemsize, max_bytes=max_bytes)

    def read_band(self, name: str, band: Band, whole: Shaped[np.ndarray, "..."], buffers: BufferPool) -> int:
        """Reads a band to its place in an array of the whole tensor, and casts it to that array's dtype.

        Args:
          name: Of the tensor.
          band: Which part; one of `cut`.
          whole: Array of the tensor's shape, in the tensor's dtype or in the model's.
          buffers: Memory for what is cast.

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
                    return num_bytes
                for part in band.cut(max(columns * itemsize, 1), max_bytes=PART_BYTES):
                    stack[part.slices] = place.read(part, own)
        except OSError as error:
            raise ValueError(f"{error.filename} cannot be read: {error.strerror or error}") from None
        return num_bytes
