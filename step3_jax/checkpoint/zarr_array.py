"""Zarr arrays on disk: plain ones, which are read and written as files, and all others, which tensorstore reads."""

from __future__ import annotations

import functools
import math
import pathlib
import reprlib
from collections.abc import Mapping

import numpy as np
import tensorstore as ts
from jaxtyping import Shaped

from step3_jax.checkpoint.placement import Band, Placement, as_matrices
from step3_jax.checkpoint.safetensors_io import DTYPE_NAMES, DTYPES, MAX_HEADER_BYTES, check_regular, parse_json

HEADER_FILE = ".zarray"
CACHE_BYTES = 2**27
ZARR_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn"}


class StoredArray:
    """A tensor that tensorstore reads: compressed, or in Orbax's database of chunks.

    Attributes:
      dtype: Name of the dtype, one of `safetensors_io.DTYPES`.
      shape: Lengths of the axes.
      chunk_bytes: Uncompressed bytes of a stored chunk, the unit of reading.
    """

    def __init__(self, store: ts.TensorStore) -> None:
        """Takes an open array.

        Raises:
          ValueError: For an unsupported dtype.
        """
        dtype = np.dtype(store.dtype.numpy_dtype)
        if dtype not in DTYPE_NAMES:
            raise ValueError(f"dtype {dtype} is not one of {', '.join(DTYPES)}")
        self._store = store
        self.dtype = DTYPE_NAMES[dtype]
        self.shape = tuple(int(length) for length in store.shape)
        chunk = [int(length or 1) for length in store.chunk_layout.read_chunk.shape or ()]
        self.chunk_bytes = math.prod(chunk) * dtype.itemsize

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def read(self, band: Band) -> Shaped[np.ndarray, "M R C"]:
        """A band in new memory."""
        columns = as_matrices(self.shape)[2]
        if len(self.shape) == 3:
            part = self._store[band.first : band.last, band.start : band.stop]
        elif len(self.shape) < 2:
            part = self._store
        else:
            part = self._store[band.start : band.stop]
        values = np.asarray(part.read().result())
        return values.reshape(band.last - band.first, band.stop - band.start, columns)

    def read_index(self, index: tuple[slice, ...]) -> Shaped[np.ndarray, "..."]:
        """A part, given by one slice per axis, each with both ends."""
        return np.asarray(self._store[index].read().result())


@functools.cache
def _context() -> ts.Context:
    """One cache for all arrays: a chunk holds several bands and is decoded as a whole."""
    return ts.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})


def open_array(item: pathlib.Path, name: str, tree: Mapping[str, object]) -> Placement | StoredArray:
    """Opens an array of an Orbax item.

    Args:
      item: Folder of the item.
      name: The array's keys, joined by dots.
      tree: The contents of Orbax's `_METADATA`, which say the layout.

    Raises:
      ValueError: If the array is missing or damaged.
    """
    if not tree.get("use_ocdbt") and not tree.get("use_zarr3"):
        place = _plain_array(item / name)
        if place is not None:
            return place
    base = item.absolute().as_uri()
    store = (
        {"driver": "ocdbt", "base": f"{base}/", "path": f"{name}/"}
        if tree.get("use_ocdbt")
        else {"driver": "file", "path": f"{item.absolute() / name}/"}
    )
    spec = {"driver": "zarr3" if tree.get("use_zarr3") else "zarr", "kvstore": store}
    try:
        return StoredArray(ts.open(ts.Spec(spec), read=True, open=True, context=_context()).result())
    except ValueError as error:
        raise ValueError(f"{item}: {name} cannot be read: {' '.join(str(error).split())[:300]}") from None


def _plain_array(folder: pathlib.Path) -> Placement | None:
    """An uncompressed array of ours; None for one that only tensorstore can read."""
    header = read_json(folder / HEADER_FILE)
    dtypes = {written: name for name, written in ZARR_DTYPES.items()}
    shape, chunks, dtype = _lengths(header, folder, "shape"), _lengths(header, folder, "chunks"), header.get("dtype")
    is_plain = header.get("compressor") is None and header.get("filters") is None and header.get("order") == "C"
    if not is_plain or header.get("dimension_separator", ".") != "." or str(dtype) not in dtypes:
        return None
    if len(shape) != len(chunks):
        raise ValueError(f"{folder / HEADER_FILE} is damaged: shape {shape}, chunks {chunks}")
    sizes, chunk = as_matrices(shape), as_matrices(chunks)
    fits = sizes[2] % chunk[2] == 0 and (chunk[0] == 1 or chunk[1] == sizes[1])
    if not fits or chunks[3:] != shape[3:] or (len(shape) > 3 and chunks[1:] != shape[1:]):
        return None
    return Placement(dtypes[str(dtype)], shape, folder, 0, chunk)


def zarr_header(place: Placement) -> dict[str, object]:
    """The header of an array that is written plain."""
    return {
        "zarr_format": 2,
        "shape": list(place.shape),
        "chunks": _chunk_lengths(place),
        "dtype": ZARR_DTYPES[place.dtype],
        "compressor": None,
        "fill_value": None,
        "filters": None,
        "order": "C",
        "dimension_separator": ".",
    }


def read_chunks(place: Placement, slices: tuple[slice, ...]) -> Shaped[np.ndarray, "..."]:
    """Reads a part, given by one slice per axis, each with both ends; only the chunk files that hold it are touched.

    Returns:
      A view of the mapped file where the part is in one chunk, otherwise a copy.

    Raises:
      ValueError: If a chunk file is missing or truncated.
    """
    dtype, chunks = DTYPES[place.dtype], _chunk_lengths(place)
    out = np.empty([part.stop - part.start for part in slices], dtype)
    grid = [range(part.start // length, -(-part.stop // length)) for part, length in zip(slices, chunks, strict=True)]
    cells = math.prod(len(steps) for steps in grid)
    for cell in np.ndindex(*(len(steps) for steps in grid)):
        numbers = [steps[number] for steps, number in zip(grid, cell, strict=True)]
        source, target = [], []
        for part, number, length in zip(slices, numbers, chunks, strict=True):
            start, stop = max(part.start, number * length), min(part.stop, (number + 1) * length)
            source.append(slice(start - number * length, stop - number * length))
            target.append(slice(start - part.start, stop - part.start))
        path = place.path / (".".join(str(number) for number in numbers) or "0")
        try:
            # Mapped only briefly: a model has more chunks than a process may have mappings.
            chunk = np.memmap(path, np.uint8, "r", 0, math.prod(chunks) * dtype.itemsize).view(dtype).reshape(chunks)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
        if cells == 1:
            return np.asarray(chunk)[tuple(source)]
        out[tuple(target)] = chunk[tuple(source)]
    return out


def _chunk_lengths(place: Placement) -> list[int]:
    matrices, rows, columns = place.chunk or as_matrices(place.shape)
    if len(place.shape) > 3:
        return [rows, *place.shape[1:]]
    return [matrices, rows, columns][3 - len(place.shape) :]


def _lengths(header: Mapping[str, object], folder: pathlib.Path, name: str) -> tuple[int, ...]:
    value = header.get(name)
    if not isinstance(value, list) or not all(type(item) is int and item > 0 for item in value):
        raise ValueError(f"{folder / HEADER_FILE} is damaged: {name} is {reprlib.repr(value)}")
    return tuple(value)


def read_json(path: pathlib.Path) -> dict[str, object]:
    """A file with one JSON object.

    Raises:
      ValueError: If it cannot be read or is something else.
    """
    check_regular(path)
    try:
        with path.open("rb") as file:
            text = file.read(MAX_HEADER_BYTES + 1)
        if len(text) > MAX_HEADER_BYTES:
            raise ValueError(f"it is above {MAX_HEADER_BYTES} bytes")
        value = parse_json(text)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: {type(value).__name__} where a JSON object is needed")
    return value
