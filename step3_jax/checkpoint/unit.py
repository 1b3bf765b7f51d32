"""One unit of a conversion: a band of a tensor, read, converted and written."""

from __future__ import annotations

import contextlib
import pathlib
import zlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Shaped

from step3_jax.checkpoint.buffer import Buffers
from step3_jax.checkpoint.manifest import Record
from step3_jax.checkpoint.names import scale_name
from step3_jax.checkpoint.placement import Band, Placement, as_bytes
from step3_jax.checkpoint.plan import Plan, Task, Tensors
from step3_jax.checkpoint.safetensors_io import DTYPES
from step3_jax.checkpoint.transform import BandError, cast_band, dequantise_band, measure_error, quantise_band
from step3_jax.checkpoint.zarr_array import StoredArray

# Bytes of a part of a unit, which is read, converted, summed and written while it is in the processor's cache.
PART_BYTES = 2**21


def read_input(
    task: Task, band: Band, tensors: Tensors, block: tuple[int, int], buffers: Buffers
) -> Iterator[tuple[Band, Shaped[np.ndarray, "M R C"], Shaped[np.ndarray, "M row_blocks column_blocks"] | None]]:
    """Reads a band of the source in parts that stay in the processor's cache until they are done.

    Args:
      task: What to do with it.
      band: The part of the tensor.
      tensors: The source's tensors.
      block: Rows and columns that share a scale.
      buffers: Where to read into; each part overwrites the previous one.

    Yields:
      The part, its values, and their scales if the task takes them.
    """
    parts = task.cut(band, PART_BYTES, block)
    values = _read_parts(tensors[task.name], band, parts, buffers, "values")
    if task.action != "dequantise":
        for part, found in zip(parts, values, strict=True):
            yield part, found, None
        return
    rows = [part.scaled(block[0]) for part in parts]
    scales = _read_parts(tensors[scale_name(task.name)], band.scaled(block[0]), rows, buffers, "scales")
    # Not all tools store them in float32.
    yield from zip(parts, values, (part.astype(np.float32, copy=False) for part in scales), strict=True)


def _read_parts(
    place: Placement | StoredArray, band: Band, parts: Sequence[Band], buffers: Buffers, name: str
) -> Iterator[Shaped[np.ndarray, "M R C"]]:
    if isinstance(place, Placement):
        place.start_reading(band)
        for part in parts:
            yield place.read(part, buffers, name)
    else:
        # tensorstore decodes whole chunks: read each once.
        whole = place.read(band)
        for part in parts:
            yield whole[part.within(band).slices]


def apply_task(
    task: Task,
    values: Shaped[np.ndarray, "M R C"],
    scales: Shaped[np.ndarray, "M row_blocks column_blocks"] | None,
    block: tuple[int, int],
) -> dict[str, Shaped[np.ndarray, "..."]]:
    """What to write at the same place of the result, by name.

    Raises:
      ValueError: If a value is not finite and cannot be quantised; the message names the tensor.
    """
    dtype = DTYPES[task.dtype]
    if task.action == "copy":
        return {task.name: values}
    if task.action == "cast":
        return {task.name: cast_band(values, dtype)}
    if task.action == "dequantise" and scales is not None:
        return {task.name: dequantise_band(values, scales, block, dtype)}
    try:
        values, scales = quantise_band(values, block)
    except ValueError as error:
        raise ValueError(f"{task.name}: {error}") from None
    return {task.name: values, scale_name(task.name): scales}


def do_unit(
    plan: Plan, places: Mapping[str, Placement], task: Task, number: int, band: Band, buffers: Buffers
) -> tuple[Record, list[pathlib.Path]]:
    """Does one unit.

    Args:
      plan: The conversion.
      places: Locations of the result's tensors.
      task: The unit's task.
      number: The band's number in the task.
      band: The part of the tensor.
      buffers: Memory to use.

    Returns:
      What to record, and the files written to.
    """
    block = plan.source.block
    outputs = _outputs(plan, places, task, band)
    checksums = dict.fromkeys((name for name, _, _ in outputs), 0)
    error = BandError() if task.is_lossy else None
    for part, values, scales in read_input(task, band, plan.source.tensors, block, buffers):
        results = apply_task(task, values, scales, block)
        for name, place, _ in outputs:
            place.write(part if name == task.name else part.scaled(block[0]), results[name], buffers)
            checksums[name] = _checksum(results[name], checksums[name])
        if error is not None:
            error += measure_error(values, results[task.name], results.get(scale_name(task.name)), block)
    paths = []
    for _, place, written in outputs:
        place.start_writeback(written)
        paths += place.files(written)
    return Record(task.name, number, tuple(checksums.values()), error), paths


def find_written(
    plan: Plan, places: Mapping[str, Placement], task: Task, band: Band, record: Record
) -> list[pathlib.Path]:
    """The files that hold what `record` says was written; none if it cannot be read back from them."""
    paths, found = [], []
    with contextlib.suppress(OSError, ValueError):
        for _, place, part in _outputs(plan, places, task, band):
            paths += place.files(part)
            found.append(_checksum(place.read(part)))
    return paths if tuple(found) == record.checksums else []


def _outputs(plan: Plan, places: Mapping[str, Placement], task: Task, band: Band) -> list[tuple[str, Placement, Band]]:
    block = plan.source.block
    names = task.outputs(block)
    return [(name, places[name], band if name == task.name else band.scaled(block[0])) for name in names]


def _checksum(values: Shaped[np.ndarray, "..."], before: int = 0) -> int:
    """CRC-32 of the bytes, continuing that of the bytes before them."""
    return zlib.crc32(as_bytes(values).reshape(-1).data, before)
