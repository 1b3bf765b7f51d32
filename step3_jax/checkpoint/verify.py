"""Compares a conversion's result with its source, tensor by tensor, both read from the disk."""

from __future__ import annotations

import concurrent.futures
import dataclasses

import numpy as np
from jaxtyping import Shaped
from tqdm import tqdm

from step3_jax.checkpoint.buffer import Buffers
from step3_jax.checkpoint.names import scale_name
from step3_jax.checkpoint.placement import Band, as_bytes
from step3_jax.checkpoint.plan import UNIT_BYTES, Task, compare_tasks
from step3_jax.checkpoint.source import Source
from step3_jax.checkpoint.transform import BandError, measure_error
from step3_jax.checkpoint.unit import apply_task, read_input


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One tensor of the source, compared with the result's.

    Attributes:
      task: What the conversion did with it.
      num_wrong_bytes: Bytes of the result that are not what they should be.
      error: The error of the values against the source's; zero where they are the same.
    """

    task: Task
    num_wrong_bytes: int
    error: BandError


def verify(source: Source, result: Source, *, num_workers: int = 2, progress: bool = False) -> list[Comparison]:
    """Reads source and result again and compares each tensor with what it should be, bit by bit.

    Args:
      source: The source of the conversion.
      result: Its result.
      num_workers: Threads.
      progress: Whether to show a bar with bytes, rate and remaining time.

    Returns:
      A comparison for each tensor, in the order of the source's.

    Raises:
      ValueError: If the two do not have the same tensors, or a file is truncated.
    """
    block = result.block if result.config.quantization is not None else source.block
    tasks = compare_tasks(source.tensors, result.tensors)
    found = {task.name: Comparison(task, 0, BandError()) for task in tasks}
    units = [(task, band) for task in tasks for band in task.bands(UNIT_BYTES, block)]
    bar = tqdm(
        total=sum(task.num_bytes(band) for task, band in units),
        desc="verifying",
        unit="B",
        unit_scale=True,
        disable=not progress,
    )
    pool = concurrent.futures.ThreadPoolExecutor(num_workers, thread_name_prefix="verify")
    try:
        with bar:
            jobs = {pool.submit(_compare, source, result, task, band, block): (task, band) for task, band in units}
            for job in concurrent.futures.as_completed(jobs):
                task, band = jobs[job]
                wrong, error = job.result()
                before = found[task.name]
                found[task.name] = Comparison(task, before.num_wrong_bytes + wrong, before.error + error)
                bar.update(task.num_bytes(band))
    finally:
        pool.shutdown(cancel_futures=True)
    return list(found.values())


def _compare(source: Source, result: Source, task: Task, band: Band, block: tuple[int, int]) -> tuple[int, BandError]:
    """Wrong bytes of a band, and the error of its stored values."""
    wrong, error = 0, BandError()
    for part, values, scales in read_input(task, band, source.tensors, block, Buffers()):
        stored: dict[str, Shaped[np.ndarray, "..."]] = {}
        for name, right in apply_task(task, values, scales, block).items():
            stored[name] = result.tensors[name].read(part if name == task.name else part.scaled(block[0]))
            wrong += int(np.count_nonzero(as_bytes(right) != as_bytes(stored[name])))
        if task.is_lossy:
            error += measure_error(values, stored[task.name], stored.get(scale_name(task.name)), block)
    return wrong, error
