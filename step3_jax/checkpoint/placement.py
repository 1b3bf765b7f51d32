"""Where a tensor's bytes are on disk, and how to read and write them band by band.

A tensor is viewed as a stack of matrices [M, R, C]: (n,) is one row, (r, c) one matrix, (e, r, c) a stack, and anything
with more axes is one matrix, with all axes after the first merged. It is contiguous in a file (a safetensors shard), or
in chunk files that are pieces of the same view (uncompressed Zarr). A band is whole matrices, or rows of one matrix:
contiguous in the first case, one contiguous range of each chunk in the second. So both forms are read with just `pread`
and written with just `pwrite`, by any number of threads, and bytes written twice are equal.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import math
import os
import pathlib
from collections.abc import Iterator

import numpy as np
from jaxtyping import Shaped, UInt8

from step3_jax.checkpoint.buffer import Buffers
from step3_jax.checkpoint.safetensors_io import DTYPES

Matrices = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Band:
    """A part of a tensor: rows `start` to `stop` of each of the matrices `first` to `last` (half-open ranges).

    With more than one matrix the rows are all rows.
    """

    first: int
    last: int
    start: int
    stop: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """Its index in the tensor, without the columns."""
        return slice(self.first, self.last), slice(self.start, self.stop)

    def within(self, other: Band) -> Band:
        """The same rows, counted from the start of another band."""
        return Band(
            self.first - other.first, self.last - other.first, self.start - other.start, self.stop - other.start
        )

    def scaled(self, rows: int) -> Band:
        """The band of the scales, one row per `rows` rows of the values."""
        return Band(self.first, self.last, self.start // rows, -(-self.stop // rows))

    def cut(self, row_bytes: int, *, max_bytes: int, multiple: int = 1) -> list[Band]:
        """Parts of at most `max_bytes`, in order; see `cut_bands`."""
        num_rows = self.stop - self.start
        if num_rows * row_bytes <= max_bytes:
            step = max(max_bytes // max(num_rows * row_bytes, 1), 1)
            return [
                Band(first, min(first + step, self.last), self.start, self.stop)
                for first in range(self.first, self.last, step)
            ]
        step = max(max_bytes // row_bytes // multiple, 1) * multiple
        return [
            Band(matrix, matrix + 1, start, min(start + step, self.stop))
            for matrix in range(self.first, self.last)
            for start in range(self.start, self.stop, step)
        ]


def as_matrices(shape: tuple[int, ...]) -> Matrices:
    """Matrices, rows and columns of the view that bands are cut from."""
    if len(shape) == 3:
        return (shape[0], shape[1], shape[2])
    if len(shape) < 2:
        return (1, 1, math.prod(shape))
    return (1, shape[0], math.prod(shape[1:]))


def cut_bands(shape: tuple[int, ...], itemsize: int, *, max_bytes: int, multiple: int = 1) -> list[Band]:
    """Cuts a tensor into bands of at most `max_bytes`, in order.

    Args:
      shape: Shape of the tensor.
      itemsize: Bytes per element; the larger one, if it is read in one dtype and written in another.
      max_bytes: Most bytes of a band, which nevertheless has at least `multiple` rows.
      multiple: Rows that must stay together: a band starts at a multiple of it.
    """
    matrices, rows, columns = as_matrices(shape)
    row_bytes = max(columns * itemsize, 1)
    return Band(0, matrices, 0, rows).cut(row_bytes, max_bytes=max_bytes, multiple=multiple)


@dataclasses.dataclass(frozen=True)
class Placement:
    """A tensor on disk.

    Attributes:
      dtype: Name of the dtype, one of `safetensors_io.DTYPES`.
      shape: Lengths of the axes.
      path: The file, or with `chunk` the folder of the chunk files.
      offset: First byte in the file; 0 with `chunk`.
      chunk: Matrices, rows and columns of a chunk file; None if the tensor is contiguous. Columns divide the tensor's; a
        chunk of several matrices has all their rows.
    """

    dtype: str
    shape: tuple[int, ...]
    path: pathlib.Path
    offset: int = 0
    chunk: Matrices | None = None

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def read(self, band: Band, buffers: Buffers | None = None, name: str = "values") -> Shaped[np.ndarray, "M R C"]:
        """A band in new memory, or in that of `buffers`, where it stays until `name` is read again.

        Raises:
          ValueError: If a file is shorter than it must be.
          OSError: If a file is missing or cannot be read.
        """
        shape = (band.last - band.first, band.stop - band.start, as_matrices(self.shape)[2])
        buffers = buffers or Buffers()
        out = buffers.take(name, shape, DTYPES[self.dtype])
        self.read_into(band, out, buffers)
        return out

    def read_into(self, band: Band, out: Shaped[np.ndarray, "M R C"], buffers: Buffers | None = None) -> None:
        """As `read`, into an array of the tensor's dtype without gaps."""
        data = out.view(np.uint8)
        for path, offset, place in self._pieces(band):
            piece = data[place]
            if piece.flags.c_contiguous:
                _read_exactly(path, offset, piece)
                continue
            buffer = (buffers or Buffers()).take("piece", piece.shape, piece.dtype)
            _read_exactly(path, offset, buffer)
            piece[...] = buffer

    def write(self, band: Band, values: Shaped[np.ndarray, "M R C"], buffers: Buffers | None = None) -> None:
        """Writes a band; creates chunk files that do not exist yet.

        Raises:
          OSError: If a file cannot be written.
        """
        if self.chunk is None:
            file_bytes = None
        else:
            file_bytes = math.prod(self.chunk) * DTYPES[self.dtype].itemsize
        data = as_bytes(values)
        for path, offset, place in self._pieces(band):
            piece = data[place]
            if not piece.flags.c_contiguous:
                piece = (buffers or Buffers()).take("piece", piece.shape, piece.dtype)
                piece[...] = data[place]
            _write_all(path, offset, piece, file_bytes)

    def start_writeback(self, band: Band) -> None:
        """Lets the system start writing a band to the disk, while others are made; does not wait."""
        for path, offset, place in self._pieces(band):
            _advise(path, offset, _num_bytes(place), "POSIX_FADV_DONTNEED")

    def start_reading(self, band: Band) -> None:
        """Lets the system start reading a band from the disk; does not wait."""
        for path, offset, place in self._pieces(band):
            _advise(path, offset, _num_bytes(place), "POSIX_FADV_WILLNEED")

    def files(self, band: Band) -> list[pathlib.Path]:
        """The files that hold a band."""
        return sorted({path for path, _, _ in self._pieces(band)})

    def _pieces(self, band: Band) -> Iterator[tuple[pathlib.Path, int, tuple[slice, slice, slice]]]:
        """File, first byte there, and index in the band (columns counted in bytes), for each contiguous range."""
        itemsize = DTYPES[self.dtype].itemsize
        sizes = as_matrices(self.shape)
        chunk_matrices, chunk_rows, chunk_columns = self.chunk or sizes
        for i in range(band.first // chunk_matrices, -(-band.last // chunk_matrices)):
            matrices = range(max(band.first, i * chunk_matrices), min(band.last, (i + 1) * chunk_matrices))
            for j in range(band.start // chunk_rows, -(-band.stop // chunk_rows)):
                rows = range(max(band.start, j * chunk_rows), min(band.stop, (j + 1) * chunk_rows))
                # All rows of several matrices are one range.
                step = len(matrices) if len(rows) == chunk_rows else 1
                for k in range(sizes[2] // chunk_columns):
                    path = self.path if self.chunk is None else self.path / self._chunk_name(i, j, k)
                    for matrix in matrices[::step]:
                        row = (matrix - i * chunk_matrices) * chunk_rows + rows.start - j * chunk_rows
                        yield (
                            path,
                            self.offset + row * chunk_columns * itemsize,
                            (
                                slice(matrix - band.first, matrix - band.first + step),
                                slice(rows.start - band.start, rows.stop - band.start),
                                slice(k * chunk_columns * itemsize, (k + 1) * chunk_columns * itemsize),
                            ),
                        )

    def _chunk_name(self, i: int, j: int, k: int) -> str:
        """Zarr's name of a chunk file: one number per axis."""
        if len(self.shape) > 3:
            return ".".join(str(number) for number in (j, *(0,) * (len(self.shape) - 1)))
        return ".".join(str(number) for number in (i, j, k)[3 - len(self.shape) :]) or "0"


def as_bytes(values: Shaped[np.ndarray, "M R C"]) -> UInt8[np.ndarray, "M R bytes"]:
    """The same memory as bytes: FP8 and BF16 have no buffer protocol."""
    return np.ascontiguousarray(values).view(np.uint8)


def _num_bytes(place: tuple[slice, slice, slice]) -> int:
    return math.prod(part.stop - part.start for part in place)


def _advise(path: pathlib.Path, offset: int, num_bytes: int, advice: str) -> None:
    """Advises the system where that is possible; a missing file is reported when it is used."""
    if not hasattr(os, advice):
        return
    with contextlib.suppress(OSError), path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), offset, num_bytes, getattr(os, advice))


def _read_exactly(path: pathlib.Path, offset: int, out: UInt8[np.ndarray, "..."]) -> None:
    buffer = memoryview(out.reshape(-1).data)
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        position = 0
        while position < len(buffer):
            count = file.readinto(buffer[position:])
            if not count:
                raise ValueError(f"{path} is truncated: it ends before byte {offset + len(buffer)}")
            position += count


def _write_all(path: pathlib.Path, offset: int, data: UInt8[np.ndarray, "..."], file_bytes: int | None) -> None:
    """Writes at an offset; a file that may be new gets its full length first."""
    buffer = memoryview(data.reshape(-1).data)
    descriptor = os.open(path, os.O_WRONLY | (os.O_CREAT if file_bytes is not None else 0), 0o644)
    try:
        if file_bytes is not None and os.fstat(descriptor).st_size != file_bytes:
            os.ftruncate(descriptor, file_bytes)
        position = 0
        while position < len(buffer):
            count = os.pwrite(descriptor, buffer[position:], offset + position)
            if not count:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            position += count
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(descriptor)
