"""Converts a checkpoint between any forms and dtypes, in bounded memory, resuming where it was stopped.

The work is cut into units, one band of one tensor each (about 16 MiB), that threads read, convert and write at their
offsets in files of full length. `DST.partial` holds the result so far and the record of what is done; at the end
the result is renamed to `DST`, so that anything of this name is always complete.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import errno
import os
import pathlib
import shutil
import time

from tqdm import tqdm

from step3_jax.checkpoint.buffer import BufferPool
from step3_jax.checkpoint.form import MAX_MEMORY
from step3_jax.checkpoint.manifest import Manifest, Record, check_free
from step3_jax.checkpoint.memory import anonymous_bytes, format_bytes
from step3_jax.checkpoint.orbax_io import ABOUT_FILE, TREE_FILE, WEIGHTS, place_arrays, write_item
from step3_jax.checkpoint.placement import Band, Placement
from step3_jax.checkpoint.plan import UNIT_BYTES, Plan, Task, result_config
from step3_jax.checkpoint.safetensors_io import DTYPES, LazyArray
from step3_jax.checkpoint.shards import Checkpoint, write_checkpoint
from step3_jax.checkpoint.source import CONFIG_FILE, Source, open_source
from step3_jax.checkpoint.transform import BandError
from step3_jax.checkpoint.unit import do_unit, find_written
from step3_jax.checkpoint.zarr_array import CACHE_BYTES, HEADER_FILE, StoredArray

MANIFEST_FILE = "manifest.jsonl"
DATA = "data"
# Memory of a worker: a unit if tensorstore reads it whole; else parts of it in both dtypes, float32 panels; what the
# # allocator keeps.
WORKER_BYTES = 6 * UNIT_BYTES
# Headers, the record, compiled code, and a margin.
RESERVED_BYTES = 2**27
# Between two syncs of the written data to the disk.
SYNC_BYTES, SYNC_SECONDS = 2**32, 30.0


@dataclasses.dataclass(frozen=True)
class Report:
    """What a conversion did.

    Attributes:
      num_tensors: Tensors of the result.
      num_bytes: Their bytes.
      bytes_read: Bytes of the source that this run read; less than all in a resumed one.
      seconds: Duration of this run.
      errors: How much the values changed, for each tensor whose values did.
    """

    num_tensors: int
    num_bytes: int
    bytes_read: int
    seconds: float
    errors: dict[str, BandError]


def partial_folder(target: pathlib.Path) -> pathlib.Path:
    """Where the unfinished result is kept."""
    return target.with_name(f"{target.name}.partial")


def convert(
    plan: Plan,
    target: str | os.PathLike[str],
    *,
    resume: bool = False,
    num_workers: int = 2,
    max_memory: int | None = None,
    progress: bool = False,
) -> Report:
    """Converts, or resumes a conversion that was stopped.

    Args:
      plan: The conversion.
      target: Folder to write; it must not exist or must be empty.
      resume: Whether to continue where an earlier run was stopped; if there was none, it starts from the beginning. A
        conversion that is already complete is recognised.
      num_workers: Threads; fewer are used if memory is short.
      max_memory: Most bytes of anonymous memory of this process, including what it has already; mapped files do not
        count. By default 4 GiB more than it has: a process that holds a model can convert one.
      progress: Whether to show a bar with bytes, rate and remaining time.

    Returns:
      What was done.

    Raises:
      ValueError: If the target exists, an unfinished result has another source or other options, there is too little
        memory, a source file is damaged, or a value is not finite and cannot be quantised.
      OSError: If reading or writing fails (the disk is full, a file has vanished): everything written is kept for
        `resume`.
    """
    target = pathlib.Path(target).absolute()
    partial = partial_folder(target)
    start = time.perf_counter()
    if _is_done(plan, target, partial, resume):
        return Report(len(plan.outputs), sum(plan.output_bytes), 0, time.perf_counter() - start, {})
    if max_memory is None:
        max_memory = anonymous_bytes() + MAX_MEMORY
    num_workers = fit_workers(plan.source, num_workers, max_memory)
    about = _about(plan)
    is_kept = partial.exists()
    try:
        if not is_kept:
            _check_space(plan, partial)
        partial.mkdir(parents=True, exist_ok=True)
        with Manifest(partial / MANIFEST_FILE, about) as manifest:
            places = _lay_out(plan, partial / DATA, manifest)
            is_kept = True
            bytes_read = _write_units(plan, places, manifest, num_workers, progress)
            if plan.source.fingerprint() != about["source"]:
                raise ValueError(f"{plan.source.folder} changed while it was read; remove {partial} and start over")
            _finish(plan, places, partial / DATA, target)
            errors: dict[str, BandError] = {}
            for record in manifest.records.values():
                if record.error is not None:
                    errors[record.tensor] = errors.get(record.tensor, BandError()) + record.error
            shutil.rmtree(partial)
    except OSError as error:
        if not is_kept:
            # There is nothing worth resuming.
            shutil.rmtree(partial, ignore_errors=True)
        raise _explain(error, partial) from error
    return Report(len(plan.outputs), sum(plan.output_bytes), bytes_read, time.perf_counter() - start, errors)


def _is_done(plan: Plan, target: pathlib.Path, partial: pathlib.Path, resume: bool) -> bool:
    """Whether there is nothing left to do; refuses a target that is in the way."""
    has_target = target.exists() and (not target.is_dir() or any(target.iterdir()))
    check_free(partial / MANIFEST_FILE)
    if partial.exists() and not resume:
        raise ValueError(
            f"{partial} holds an unfinished conversion: continue it with --resume, or remove it to start over"
        )
    if not has_target:
        return False
    if resume and target.is_dir() and not (partial / DATA).exists():
        with contextlib.suppress(ValueError):
            result = open_source(target)
            found = {name: (place.dtype, place.shape) for name, place in result.tensors.items()}
            if result.form == plan.form and found == plan.outputs:
                # Stopped between the rename and the removal.
                shutil.rmtree(partial, ignore_errors=True)
                return True
    raise ValueError(f"{target} exists; give another folder, or remove it")


def _about(plan: Plan) -> dict[str, object]:
    options = {
        "--to": plan.form,
        "--dtype": plan.dtype,
        "--shard-size": plan.shard_bytes if plan.form == "hf" else None,
        "unit_bytes": plan.unit_bytes,
        "block": list(plan.source.block),
    }
    return {"options": options, "source": plan.source.fingerprint()}


def fit_workers(source: Source, num_workers: int, max_memory: int) -> int:
    """As many threads as memory allows, at most `num_workers`.

    Args:
      source: The checkpoint they will read.
      num_workers: The number to use if there is memory for them.
      max_memory: Most bytes of anonymous memory of this process.

    Raises:
      ValueError: If there is not enough memory for one.
    """
    if num_workers < 1:
        raise ValueError(f"the number of workers is {num_workers}; at least 1 is needed")
    stored = [place.chunk_bytes for place in source.tensors.values() if isinstance(place, StoredArray)]
    # tensorstore decodes whole chunks, and caches some.
    each = WORKER_BYTES + 2 * max(stored, default=0)
    base = anonymous_bytes() + RESERVED_BYTES + (CACHE_BYTES if stored else 0)
    if max_memory < base + each:
        raise ValueError(
            f"--max-memory is {max_memory / 2**20:.0f} MiB; this conversion needs at least "
            f"{-(-(base + each) // 2**20)} MiB ({-(-base // 2**20)} for the program, {-(-each // 2**20)} per worker)"
        )
    return min(num_workers, (max_memory - base) // each)


def _lay_out(plan: Plan, data: pathlib.Path, manifest: Manifest) -> dict[str, Placement]:
    """Creates the files that units are written to, at full length, and finds the units' places in them."""
    item = data / WEIGHTS
    if not manifest.is_laid_out:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(data)
        data.mkdir()
        _check_space(plan, data)
        if plan.form == "hf":
            holes = [(name, LazyArray(shape, DTYPES[dtype], None)) for name, (dtype, shape) in plan.outputs.items()]
            write_checkpoint(data, holes, max_shard_bytes=plan.shard_bytes)
        _sync({data})
        manifest.mark_laid_out()
    if plan.form == "orbax":
        places = place_arrays(plan.outputs, item)
        for place in places.values():
            place.path.mkdir(parents=True, exist_ok=True)
        return places
    with Checkpoint(data) as checkpoint:
        return checkpoint.places


def _check_space(plan: Plan, folder: pathlib.Path) -> None:
    """Refuses a result that does not fit on the disk of `folder`."""
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    needed, free = sum(plan.output_bytes), shutil.disk_usage(place).free
    if needed > free:
        text = f"the result needs {format_bytes(needed)}, but {format_bytes(free)} are free"
        raise OSError(errno.ENOSPC, text, str(place))


def _write_units(plan: Plan, places: dict[str, Placement], manifest: Manifest, num_workers: int, progress: bool) -> int:
    """Does all units that are not done yet; returns the bytes read."""
    todo, done_bytes, total_bytes = [], 0, 0
    written: set[pathlib.Path] = set()
    buffers = BufferPool()
    for task, number, band in plan.units():
        size = task.num_bytes(band)
        total_bytes += size
        record = manifest.unsynced.get((task.name, number))
        if record is not None:
            files = find_written(plan, places, task, band, record)
            written.update(files)
            if not files:
                manifest.forget(record)
        if (task.name, number) in manifest.records:
            done_bytes += size
        else:
            todo.append((task, number, band))
    bar = tqdm(
        total=total_bytes, initial=done_bytes, desc="converting", unit="B", unit_scale=True, disable=not progress
    )
    fresh_bytes, last_sync = 0, time.monotonic()

    def work(task: Task, number: int, band: Band) -> tuple[Record, list[pathlib.Path]]:
        with buffers.lend() as own:
            return do_unit(plan, places, task, number, band, own)

    pool = concurrent.futures.ThreadPoolExecutor(num_workers, thread_name_prefix="convert")
    try:
        with bar:
            jobs = {pool.submit(work, *unit): unit for unit in todo}
            for job in concurrent.futures.as_completed(jobs):
                record, paths = job.result()
                manifest.add(record)
                task, _, band = jobs.pop(job)
                written.update(paths)
                fresh_bytes += task.num_bytes(band)
                bar.update(task.num_bytes(band))
                if fresh_bytes >= SYNC_BYTES or time.monotonic() - last_sync >= SYNC_SECONDS:
                    _sync(written)
                    manifest.mark_synced()
                    written.clear()
                    fresh_bytes, last_sync = 0, time.monotonic()
    except ValueError as error:
        folder = manifest.path.parent
        raise ValueError(f"{error}; what is done is kept in {folder}: fix this and run again with --resume") from None
    finally:
        # Let running units finish, so that nothing writes behind the caller's back.
        pool.shutdown(cancel_futures=True)
    _sync(written)
    manifest.mark_synced()
    return total_bytes - done_bytes


def _finish(plan: Plan, places: dict[str, Placement], data: pathlib.Path, target: pathlib.Path) -> None:
    """Adds the files other than weights, syncs everything to the disk, and gives the result its name."""
    files, folders = {data / CONFIG_FILE}, {data}
    for name, companion in plan.source.companion_names.items():
        path = data / name
        path.parent.mkdir(exist_ok=True)
        shutil.copyfile(companion, path)
        files.add(path)
        folders.add(path.parent)
    if plan.form == "orbax":
        item = data / WEIGHTS
        write_item(places, item)
        folders |= {item, *(place.path for place in places.values())}
        files |= {item / TREE_FILE, item / ABOUT_FILE, *(place.path / HEADER_FILE for place in places.values())}
    # Last: a folder without it does not load.
    config = result_config(plan.source.config_path.read_bytes(), plan.tasks, plan.dtype, plan.source.block)
    (data / CONFIG_FILE).write_bytes(config)
    _sync(files | folders)
    data.rename(target)
    _sync({target.parent})


def _sync(paths: set[pathlib.Path]) -> None:
    for path in sorted(paths):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _explain(error: OSError, partial: pathlib.Path) -> OSError:
    """The same error with what to do next."""
    if partial.exists():
        advice = f"what is done is kept in {partial}: fix this and run again with --resume"
    else:
        advice = f"nothing was written to {partial.parent}"
    return OSError(error.errno, f"{error.strerror or error}; {advice}", error.filename)
