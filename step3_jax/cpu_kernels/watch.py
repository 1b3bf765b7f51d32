"""Mapped files that hold weights: the process says which one was cut short, and pieces are read ahead of use."""

from __future__ import annotations

import ctypes
import dataclasses
import mmap
import os
import pathlib
import weakref

import numpy as np
from jaxtyping import UInt8

from step3_jax.cpu_kernels.loader import Unavailable, find_kernels


@dataclasses.dataclass(frozen=True)
class ReadCounts:
    """Reads of mapped weights by the kernels, since the process started.

    Attributes:
      used_bytes: Asked for, by whole pages of the system.
      resident_bytes: Of them in memory already; the others came from the disk. Linux calls every page of a file
        resident that the process neither owns nor may write.
    """

    used_bytes: int
    resident_bytes: int

    @property
    def hit_rate(self) -> float:
        """The share that was in memory; 1 if nothing was read."""
        return self.resident_bytes / self.used_bytes if self.used_bytes else 1.0

    def since(self, before: ReadCounts) -> ReadCounts:
        """The reads since an earlier count."""
        return ReadCounts(self.used_bytes - before.used_bytes, self.resident_bytes - before.resident_bytes)


def map_file(path: pathlib.Path) -> UInt8[np.ndarray, "bytes"]:
    """A file's bytes, read-only, mapped for as long as an array uses them.

    If the file is cut short meanwhile, or the disk fails, a read of what is missing ends the process with a message that
    names it. Signals of such reads that another library has taken for itself come to it again.

    Raises:
      ValueError: If the file cannot be mapped or watched, or there is no library that does so.
    """
    library = _library()
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            data = np.frombuffer(mapped, np.uint8)
            failed = library.step3_watch_mapping(data.ctypes.data, data.nbytes, file.fileno(), os.fsencode(path)) != 0
    except OSError as error:
        raise ValueError(f"{path} cannot be mapped: {error.strerror or error}") from None
    if failed:
        raise ValueError(f"{path} cannot be watched: too many files are mapped or open")
    weakref.finalize(mapped, library.step3_forget_mapping, data.ctypes.data)
    return data


def count_reads() -> ReadCounts:
    """Reads of mapped weights so far."""
    used, resident = ctypes.c_int64(), ctypes.c_int64()
    _library().step3_count_reads(ctypes.byref(used), ctypes.byref(resident))
    return ReadCounts(used.value, resident.value)


def _library() -> ctypes.CDLL:
    kernels = find_kernels()
    if isinstance(kernels, Unavailable):
        raise ValueError(f"load_format mmap needs the CPU kernels' library, which watches the files: {kernels.reason}")
    library = ctypes.CDLL(str(kernels.path))
    library.step3_watch_mapping.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_char_p]
    library.step3_watch_mapping.restype = ctypes.c_int
    library.step3_forget_mapping.argtypes = [ctypes.c_size_t]
    library.step3_forget_mapping.restype = None
    library.step3_count_reads.argtypes = [ctypes.POINTER(ctypes.c_int64)] * 2
    library.step3_count_reads.restype = None
    return library
