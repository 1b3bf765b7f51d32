"""Memory that threads reuse for band after band."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import numpy as np
from jaxtyping import Shaped

# The alignment that XLA on CPU needs to take an array without a copy.
ALIGNMENT = 64


class Buffers:
    """Named buffers, each as large as the largest array it ever held; for one thread.

    Fresh memory costs as much as a copy: the system clears each page when it is first touched.
    """

    def __init__(self) -> None:
        self._memory: dict[str, Shaped[np.ndarray, "bytes"]] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> Shaped[np.ndarray, "..."]:
        """An uninitialised array, which the next array of this name overwrites."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if name not in self._memory or self._memory[name].size < num_bytes:
            self._memory[name] = empty_aligned((num_bytes,), np.dtype(np.uint8))
        return self._memory[name][:num_bytes].view(dtype).reshape(shape)


class BufferPool:
    """A pool of buffers for several threads; it grows to as many as were in use at once."""

    def __init__(self) -> None:
        self._free: list[Buffers] = []

    @contextlib.contextmanager
    def lend(self) -> Iterator[Buffers]:
        """Buffers for the caller's exclusive use until the context ends."""
        try:
            buffers = self._free.pop()
        except IndexError:
            buffers = Buffers()
        try:
            yield buffers
        finally:
            self._free.append(buffers)


def empty_aligned(shape: tuple[int, ...], dtype: np.dtype) -> Shaped[np.ndarray, "..."]:
    """A new uninitialised array that starts at a multiple of `ALIGNMENT`."""
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(num_bytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + num_bytes].view(dtype).reshape(shape)
