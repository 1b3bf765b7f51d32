"""Safetensors files, read through a memory map and written as a stream.

Our own reader, because the numpy side of the `safetensors` package cannot return FP8 arrays, and because a checkpoint of
642 GB must never be held in memory: a read touches only the pages of the requested tensor (or slice of it).

The format: 8 bytes with the length of the header (little endian), the header (a JSON object: name -> dtype, shape,
data_offsets), then the data, tensor after tensor without gaps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import mmap
import os
import pathlib
import reprlib
import stat
import types
from collections.abc import Callable, Iterable, Iterator, Mapping

import ml_dtypes
import numpy as np
from jaxtyping import Array, Shaped

from step3_jax.checkpoint.buffer import ALIGNMENT
from step3_jax.stored_file import START_BYTES, describe_stand_in

# Fifty times the header of all 2,319 tensors of the FP8 release. As Python objects hostile JSON takes 25 times its bytes.
MAX_HEADER_BYTES = 16 * 10**6
MAX_NAME_LENGTH = 1000
MAX_AXES = 32
MAX_POSITION = 2**62
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "C64": np.dtype(np.complex64),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
# The format's other dtypes: numpy has no arrays of these, so such a tensor is listed, and never read.
SMALL_DTYPE_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Index = tuple[slice | int, ...] | slice | int | types.EllipsisType


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One entry of a header.

    Attributes:
      dtype: Name of the dtype, one of `DTYPES` or `SMALL_DTYPE_BITS`.
      shape: Lengths of the axes.
      start: First byte, counted from the start of the file.
      stop: Byte after the last.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start


class SafetensorsFile:
    """One file, mapped for reading. The header is checked in full when the file is opened.

    Attributes:
      path: The file.
      tensors: Name -> entry of the header, in file order.
      metadata: The header's `__metadata__`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens `path`.

        Raises:
          ValueError: If the file is missing or damaged; the message names the file and what is wrong.
        """
        self.path = pathlib.Path(path)
        check_regular(self.path)
        try:
            with self.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                what = describe_stand_in(file.read(START_BYTES))
                if what is not None:
                    raise ValueError(f"{self.path} is {what}")
                file.seek(0)
                header, data_start = _read_header(self.path, file.read(8), size, file.read)
                self.tensors, self.metadata = _parse_header(self.path, header, data_start, size)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ValueError(f"{self.path} cannot be read: {error.strerror or error}") from None

    def read(self, name: str, index: Index = ...) -> Shaped[np.ndarray, "..."]:
        """A tensor, or a part of it, as a read-only view of the mapping: nothing is copied.

        Args:
          name: Name of the tensor.
          index: Basic numpy index (numbers and slices).

        Raises:
          ValueError: If there is no such tensor, or numpy has no arrays of its dtype.
        """
        if name not in self.tensors:
            raise ValueError(f"{self.path} has no tensor {name}")
        info = self.tensors[name]
        if info.dtype not in DTYPES:
            raise ValueError(f"{self.path}: tensor {name} is {info.dtype}, which cannot be read here")
        dtype, count = DTYPES[info.dtype], math.prod(info.shape)
        if not count:
            return np.empty(info.shape, dtype)[index]
        return np.frombuffer(self._map, dtype, count, info.start).reshape(info.shape)[index]

    def close(self) -> None:
        """Unmaps the file; while views of it are alive, the mapping stays until the last one is gone."""
        with contextlib.suppress(BufferError):
            self._map.close()

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read_header(
    path: pathlib.Path, prefix: bytes, size: int, read: Callable[[int], bytes]
) -> tuple[dict[str, object], int]:
    """The header as a JSON object, and the position of the first data byte."""
    if len(prefix) < 8:
        raise ValueError(f"{path} is truncated: {size} bytes, a safetensors file has at least 8")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise ValueError(
            f"{path} is not a safetensors file: its header would be {length} bytes, the limit is {MAX_HEADER_BYTES}"
        )
    if 8 + length > size:
        raise ValueError(f"{path} is truncated: its header needs {8 + length} bytes, the file has {size}")
    try:
        header = parse_json(read(length))
    except ValueError as error:
        raise ValueError(f"{path}: its header is damaged: {error}") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path}: its header is damaged: {type(header).__name__} where a JSON object is needed")
    return header, 8 + length


def parse_json(text: bytes) -> object:
    """JSON from an untrusted file.

    Raises:
      ValueError: If it is not UTF-8 or not JSON, is nested too deeply, or an object has a name twice.
    """
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_refuse_duplicates)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def check_regular(path: pathlib.Path) -> None:
    """Refuses anything but a regular file: a pipe would block, a device has no end.

    Raises:
      ValueError: If `path` is missing, cannot be reached, or is not a regular file; the message names it.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} cannot be read: it is not a regular file")


def check_name(where: str, name: str) -> None:
    """Refuses a tensor name that would flood a message or control the terminal that shows it.

    Raises:
      ValueError: If it is longer than `MAX_NAME_LENGTH` or has a character that cannot be printed.
    """
    if len(name) > MAX_NAME_LENGTH or not name.isprintable():
        raise ValueError(
            f"{where}: a tensor's name is {reprlib.repr(name)} ({len(name)} characters); at most {MAX_NAME_LENGTH} "
            "printable ones are allowed"
        )


def _refuse_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the name {reprlib.repr(name)} appears twice")
            seen.add(name)
    return result


def _parse_header(
    path: pathlib.Path, header: dict[str, object], data_start: int, size: int
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path}: __metadata__ in its header is not an object of strings")
    for name in header:
        check_name(str(path), name)
    tensors = {name: _parse_entry(f"{path}: tensor {name}", entry, data_start) for name, entry in header.items()}
    # An empty tensor sorts before the one that starts at the same byte.
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)))
    end = data_start
    for name, info in tensors.items():
        if info.stop > size:
            raise ValueError(f"{path} is truncated: tensor {name} ends at byte {info.stop}, the file has {size}")
        if info.start != end:
            problem = "overlaps the tensor before it" if info.start < end else f"leaves {info.start - end} bytes unused"
            raise ValueError(f"{path}: tensor {name} {problem}")
        end = info.stop
    if end != size:
        raise ValueError(f"{path} has {size - end} bytes after its last tensor")
    return tensors, metadata


def _parse_entry(where: str, entry: object, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: its entry is {type(entry).__name__}, a JSON object is needed")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES.keys() | SMALL_DTYPE_BITS.keys():
        raise ValueError(f"{where}: dtype is {reprlib.repr(dtype)}; known: {', '.join((*DTYPES, *SMALL_DTYPE_BITS))}")
    # numpy refuses a product of axes it cannot address even where another axis is zero.
    if (
        not isinstance(shape, list)
        or not _are_sizes(shape)
        or len(shape) > MAX_AXES
        or math.prod(n for n in shape if n) >= 2**59
    ):
        raise ValueError(f"{where}: shape is {reprlib.repr(shape)}; a list of sizes that fit in memory is needed")
    if (
        not isinstance(offsets, list)
        or not _are_sizes(offsets)
        or len(offsets) != 2
        or not offsets[0] <= offsets[1] < MAX_POSITION
    ):
        raise ValueError(f"{where}: data_offsets is {reprlib.repr(offsets)}; two ordered positions are needed")
    bits = SMALL_DTYPE_BITS[dtype] if dtype in SMALL_DTYPE_BITS else 8 * DTYPES[dtype].itemsize
    need, have = math.prod(shape) * bits, 8 * (offsets[1] - offsets[0])
    if need != have:
        raise ValueError(f"{where}: {dtype} {list(shape)} needs {need / 8:.15g} bytes, data_offsets give {have // 8}")
    return TensorInfo(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _are_sizes(items: list[object]) -> bool:
    # `type`, because a JSON true is a bool, which is an int.
    return all(type(item) is int and item >= 0 for item in items)


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array to write that is made piece by piece, so that it is never whole in memory.

    Attributes:
      shape: Shape of the whole array.
      dtype: Dtype of the whole array.
      pieces: Yields the pieces in order; their concatenated bytes are the array's. None leaves zeros, as a hole
        in the file, which takes no disk space where the file system supports it.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: Callable[[], Iterator[Shaped[np.ndarray, "..."]]] | None


Writable = Shaped[np.ndarray, "..."] | Shaped[Array, "..."] | LazyArray


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Iterable[tuple[str, Writable]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes one file: to a temporary name first, then renamed, so that `path` is never half-written.

    Args:
      path: The file to write; an existing one is replaced.
      tensors: Names and arrays. Arrays on a device and `LazyArray` are brought to the host one at a time.
      metadata: Strings for the header.

    Raises:
      ValueError: For a dtype the format does not have, a duplicate name, or a `LazyArray` of another size than declared.
    """
    path = pathlib.Path(path)
    # Those that would misalign what follows come last, see below; at full size there are none.
    tensors = sorted(tensors, key=lambda item: num_bytes(item[1]) % ALIGNMENT != 0)
    header: dict[str, object] = {"__metadata__": dict(metadata or {"format": "pt"})}
    position = 0
    for name, array in tensors:
        if name in header:
            raise ValueError(f"{path}: tensor {name} is given twice")
        stop = position + num_bytes(array)
        header[name] = {"dtype": _dtype_name(name, array), "shape": list(array.shape), "data_offsets": [position, stop]}
        position = stop
    encoded = json.dumps(header, separators=(",", ":")).encode()
    # If the data start at a multiple of it, so do the tensors, which can then be used in place, see `mapped`.
    encoded += b" " * (-(8 + len(encoded)) % ALIGNMENT)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            for name, array in tensors:
                start = file.tell()
                for piece in _pieces(array):
                    # FP8 and BF16 have no buffer protocol: write them as bytes.
                    file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
                if isinstance(array, LazyArray) and array.pieces is None:
                    file.truncate(file.seek(num_bytes(array), os.SEEK_CUR))
                if file.tell() - start != num_bytes(array):
                    raise ValueError(
                        f"{path}: the pieces of {name} do not add up to the {num_bytes(array)} bytes it needs"
                    )
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _pieces(array: Writable) -> Iterator[Shaped[np.ndarray, "..."]]:
    if not isinstance(array, LazyArray):
        yield np.asarray(array)
    elif array.pieces is not None:
        yield from array.pieces()


def num_bytes(array: Writable) -> int:
    """Bytes that `array` takes in a file."""
    return math.prod(array.shape) * np.dtype(array.dtype).itemsize


def _dtype_name(name: str, array: Writable) -> str:
    dtype = np.dtype(array.dtype)
    if dtype not in DTYPE_NAMES:
        raise ValueError(f"tensor {name} has dtype {dtype}; safetensors has {', '.join(DTYPES)}")
    return DTYPE_NAMES[dtype]
