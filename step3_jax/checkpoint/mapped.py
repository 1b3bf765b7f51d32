"""Weights that stay in their file: it is mapped, and JAX takes the mapped memory as an array.

Nothing is copied, so a model may be larger than memory, and several processes share what the system has read. The
price is that weights are no longer protected: writing to the file changes the model. Truncating the file kills
the process; `cpu_kernels.watch` makes it say why.
"""

from __future__ import annotations

import collections
import dataclasses
import pathlib

import numpy as np
from jaxtyping import Shaped, UInt8

from step3_jax.checkpoint.buffer import ALIGNMENT
from step3_jax.checkpoint.memory import format_bytes
from step3_jax.checkpoint.placement import Placement
from step3_jax.checkpoint.safetensors_io import DTYPES
from step3_jax.checkpoint.zarr_array import StoredArray
from step3_jax.cpu_kernels.watch import map_file

CAST, QUANTISED, CHUNKED = "cast to another dtype", "quantised at load", "in several files or chunks"
UNALIGNED = f"not at a multiple of {ALIGNMENT} bytes in its file (step3 convert writes them so)"


class MappedFiles:
    """Files of a checkpoint, each mapped once, for as long as an array uses it."""

    def __init__(self) -> None:
        self._maps: dict[pathlib.Path, UInt8[np.ndarray, "bytes"]] = {}

    def view(self, place: Placement) -> Shaped[np.ndarray, "..."]:
        """A tensor without an obstacle, read-only, in the mapped memory.

        Raises:
          ValueError: If the file cannot be mapped.
        """
        if place.path not in self._maps:
            self._maps[place.path] = map_file(place.path)
        data = self._maps[place.path][place.offset : place.offset + place.num_bytes]
        return data.view(DTYPES[place.dtype]).reshape(place.shape)


def find_obstacle(place: Placement | StoredArray, dtype: np.dtype) -> str | None:
    """Why a tensor cannot be used in place, in a few words; None if it can.

    Args:
      place: Its location.
      dtype: The dtype it is needed in.
    """
    if DTYPES[place.dtype] != dtype:
        return CAST
    if not isinstance(place, Placement) or place.chunk is not None:
        return CHUNKED
    # A map starts at a page, so an address has the alignment of its file offset.
    return UNALIGNED if place.offset % ALIGNMENT else None


@dataclasses.dataclass
class LoadReport:
    """How many bytes of a checkpoint were mapped and copied.

    Attributes:
      mapped_bytes: Bytes left in their files.
      copied_bytes: Bytes copied, by reason; "asked for" without `load_format` mmap.
    """

    mapped_bytes: int = 0
    copied_bytes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def __str__(self) -> str:
        if not self.mapped_bytes and not self.copied_bytes:
            return "nothing was read"
        copied = ", ".join(f"{format_bytes(size)} {why}" for why, size in self.copied_bytes.most_common())
        total = format_bytes(sum(self.copied_bytes.values()))
        return f"{format_bytes(self.mapped_bytes)} mapped, {total} copied" + (f" ({copied})" if copied else "")
