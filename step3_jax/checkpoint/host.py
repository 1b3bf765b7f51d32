"""Weights in the memory of this machine, where a CPU multiplies them: as stored, quantised, or in one dtype.

Threads read each band into memory that JAX then takes without a copy: a model takes no more memory than its
weights in the form they are held in. With `load_format` mmap, weights that need no change stay in their file (see `mapped`).
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Shaped
from tqdm import tqdm

from step3_jax.checkpoint.buffer import BufferPool, empty_aligned
from step3_jax.checkpoint.mapped import CAST, QUANTISED, LoadReport, MappedFiles, find_obstacle
from step3_jax.checkpoint.names import released_name, scale_name
from step3_jax.checkpoint.placement import Placement
from step3_jax.checkpoint.quantised import QuantisedParts
from step3_jax.checkpoint.reader import TensorReader
from step3_jax.checkpoint.safetensors_io import DTYPES
from step3_jax.config import VisionConfig
from step3_jax.layout.table import view_shape
from step3_jax.layout.tensor import Path
from step3_jax.quant import BlockScaled, PackedInt4

COPIED = "as stored"


class HostLoader:
    """Loads parameters into this machine's memory.

    Attributes:
      report: How many bytes were mapped and copied.
    """

    def __init__(self, reader: TensorReader, files: MappedFiles | None, vision: VisionConfig | None) -> None:
        """Takes the reader.

        Args:
          reader: Says which form each parameter is held in.
          files: Files in which weights may stay; None copies all.
          vision: The vision configuration; the tower's tensors may have more axes than on disk.
        """
        self._reader = reader
        self._files = files
        self._vision = vision
        self._buffers = BufferPool()
        self.report = LoadReport()

    def fill(
        self,
        flat: Mapping[Path, nnx.Param],
        shardings: Mapping[Path, NamedSharding] | None,
        pool: concurrent.futures.ThreadPoolExecutor,
        bar: tqdm,
    ) -> None:
        """Reads parameters, several bands at a time.

        Args:
          flat: Parameters by path; each gets its value.
          shardings: Shardings on one device each; None for the default device.
          pool: Threads that read.
          bar: Updated with the bytes read.

        Raises:
          ValueError: If a file is missing, truncated, or cannot be read, or a value cannot be held.
        """
        started = {path: self._start(path, shardings[path] if shardings is not None else None, pool) for path in flat}
        for path in list(started):
            pending = started.pop(path)
            for job in pending.jobs:
                bar.update(job.result())
            bar.update(pending.mapped_bytes)
            flat[path].set_value(pending.place())

    def _start(
        self, path: Path, sharding: NamedSharding | None, pool: concurrent.futures.ThreadPoolExecutor
    ) -> _Pending:
        reader, name = self._reader, released_name(path)
        pending = _Pending(sharding)
        if reader.is_quantised_here(name):
            shape = reader.checkpoint.tensors[name].shape
            pending.quantised = parts = QuantisedParts.empty(reader.form(name), shape, reader.block)
            pending.jobs += [pool.submit(reader.quantise_band, name, band, parts) for band in reader.cut(name)]
            self._count(name, QUANTISED)
            return pending
        if reader.is_kept(name):
            pending.block = reader.block
            for part in (name, scale_name(name)):
                pending.arrays.append(self._start_part(part, reader.kept_dtype(part), pending, pool))
            return pending
        array = self._start_part(name, reader.plain_dtype(name), pending, pool)
        num_axes = len(sharding.spec) if sharding is not None else 0
        pending.arrays.append(array.reshape(view_shape(array.shape, path, num_axes, self._vision)))
        return pending

    def _start_part(
        self, name: str, dtype: np.dtype, pending: _Pending, pool: concurrent.futures.ThreadPoolExecutor
    ) -> Shaped[np.ndarray, "..."]:
        """An array of one tensor, in the file or to be read."""
        reader, place = self._reader, self._reader.checkpoint.places[name]
        obstacle = COPIED if DTYPES[place.dtype] == dtype else CAST
        if self._files is not None:
            found = find_obstacle(place, dtype)
            if found is None and isinstance(place, Placement):
                self.report.mapped_bytes += place.num_bytes
                pending.mapped_bytes += place.num_bytes
                return self._files.view(place)
            obstacle = found or obstacle
        self._count(name, obstacle)
        # The system allocates no memory before it is written to.
        array = empty_aligned(place.shape, dtype)
        pending.jobs += [pool.submit(reader.read_band, name, band, array, self._buffers) for band in reader.cut(name)]
        return array

    def _count(self, name: str, why: str) -> None:
        self.report.copied_bytes[why] += self._reader.checkpoint.tensors[name].num_bytes


@dataclasses.dataclass
class _Pending:
    """A parameter that is being read.

    Attributes:
      sharding: Its device.
      arrays: One for a plain parameter, values and scales for one that stays FP8.
      block: The block size of the latter.
      quantised: A weight that is quantised here.
      jobs: Each returns the bytes that it has read.
      mapped_bytes: Bytes left in the file.
    """

    sharding: NamedSharding | None
    arrays: list[Shaped[np.ndarray, "..."]] = dataclasses.field(default_factory=list)
    block: tuple[int, int] | None = None
    quantised: QuantisedParts | None = None
    jobs: list[concurrent.futures.Future[int]] = dataclasses.field(default_factory=list)
    mapped_bytes: int = 0

    def place(self) -> Shaped[Array, "..."] | BlockScaled | PackedInt4:
        """The parameter as a JAX array, in the memory it was read into; nothing is copied."""
        if self.quantised is not None:
            return self.quantised.place(self.sharding)
        arrays = [jax.device_put(array, self.sharding, may_alias=True) for array in self.arrays]
        if self.block is None:
            return arrays[0]
        values, scales = arrays
        return BlockScaled(values, scales, self.block)
