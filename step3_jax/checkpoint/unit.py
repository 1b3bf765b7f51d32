"""One unit of a conversion: a band of a tensor, read, changed and written."""

from __future__ import annotations

import contextlib
import pathlib
import zlib
from collections.abc import Mapping

import numpy as np
from jaxtyping import Shaped

from step3_jax.checkpoint.manifest import Record
from step3_jax.checkpoint.names import scale_name
from step3_jax.checkpoint.placement import Band, Placement, as_bytes
from step3_jax.checkpoint.plan import Plan, Task, Tensors
from step3_jax.checkpoint.safetensors_io import DTYPES
from step3_jax.checkpoint.transform import cast_band, dequantise_band, measure_error, quantise_band


def read_input(
    task: Task, band: Band, tensors: Tensors, block: tuple[int, int]
) -> tuple[Shaped[np.ndarray, "M R C"], Shaped[np.ndarray, "M row_blocks column_blocks"] | None]:
    """Values of a band of the source, and their scales if the task takes them.

    Args:
      task: What is to be done with them.
      band: Which part.
      tensors: Of the source.
      block: Rows and columns that share a scale.
    """
    scales = tensors[scale_name(task.name)].read(band.scaled(block[0])) if task.action == "dequantise" else None
    return tensors[task.name].read(band), scales


def apply_task(
    task: Task,
    values: Shaped[np.ndarray, "M R C"],
    scales: Shaped[np.ndarray, "M row_blocks column_blocks"] | None,
    block: tuple[int, int],
) -> dict[str, Shaped[np.ndarray, "..."]]:
    """What belongs at the same place of the result, by name.

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
    plan: Plan, places: Mapping[str, Placement], task: Task, number: int, band: Band
) -> tuple[Record, list[pathlib.Path]]:
    """Does one unit.

    Args:
      plan: The conversion.
      places: Of the result's tensors.
      task: Of the unit.
      number: Of the band in the task.
      band: Which part.

    Returns:
      What to write down, and the files written to.
    """
    block = plan.source.block
    values, scales = read_input(task, band, plan.source.tensors, block)
    results = apply_task(task, values, scales, block)
    paths, checksums = [], []
    for name, place, part in _outputs(plan, places, task, band):
        paths += place.write(part, results[name])
        checksums.append(_checksum(results[name]))
    error = None
    if task.is_lossy:
        error = measure_error(values, results[task.name], results.get(scale_name(task.name)), block)
    return Record(task.name, number, tuple(checksums), error), paths


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


def _checksum(values: Shaped[np.ndarray, "..."]) -> int:
    return zlib.crc32(as_bytes(values).reshape(-1).data)
