"""A checkpoint folder: one `model.safetensors`, or shards with an index, seen as one set of tensors."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Shaped

from step3_jax.checkpoint.safetensors_io import (
    Index,
    SafetensorsFile,
    TensorInfo,
    Writable,
    num_bytes,
    write_safetensors,
)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_LISTED = 20


class Checkpoint:
    """All tensors of a folder, mapped for reading.

    Attributes:
      folder: Where they lie.
      tensors: Name -> dtype, shape and place.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Opens the files of `folder` and checks all their headers.

        Raises:
          ValueError: If there are no weights, a file is damaged, or the index does not fit its shards; all damage that
            is found is named.
        """
        self.folder = pathlib.Path(folder)
        weight_map: dict[str, str] | None = None
        if (self.folder / SINGLE_FILE).exists():
            names = [SINGLE_FILE]
        elif (self.folder / INDEX_FILE).exists():
            weight_map = _read_index(self.folder)
            names = sorted(set(weight_map.values()))
        else:
            raise ValueError(f"{self.folder} holds no weights: neither {SINGLE_FILE} nor {INDEX_FILE} is there")
        problems: list[str] = []
        self._files: dict[str, SafetensorsFile] = {}
        self._file_of: dict[str, str] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for name in names:
            try:
                self._files[name] = SafetensorsFile(self.folder / name)
            except ValueError as error:
                problems.append(str(error))
                continue
            for tensor, info in self._files[name].tensors.items():
                if tensor in self._file_of:
                    problems.append(f"tensor {tensor} is in {self._file_of[tensor]} and in {name}")
                self._file_of[tensor] = name
                self.tensors[tensor] = info
        if weight_map is not None:
            problems += _compare_index(weight_map, self._file_of, set(self._files))
        if problems:
            self.close()
            raise ValueError(f"{self.folder}: " + summarise("damaged", problems))

    def read(self, name: str, index: Index = ...) -> Shaped[np.ndarray, "..."]:
        """A tensor, or a part of it, as a read-only view of the mapped file.

        Raises:
          ValueError: If there is no such tensor.
        """
        if name not in self._file_of:
            raise ValueError(f"{self.folder} has no tensor {name}")
        return self._files[self._file_of[name]].read(name, index)

    def close(self) -> None:
        """Unmaps all files."""
        for file in self._files.values():
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def write_checkpoint(
    folder: str | os.PathLike[str],
    tensors: Iterable[tuple[str, Writable]],
    *,
    max_shard_bytes: int,
    metadata: Mapping[str, str] | None = None,
) -> list[pathlib.Path]:
    """Writes tensors, in order, as one file or as shards with an index.

    Args:
      folder: An existing folder.
      tensors: Names and arrays; brought to the host one at a time.
      max_shard_bytes: A shard's tensors have at most that many bytes; a larger tensor gets a shard of its own.
      metadata: Strings for the headers.

    Returns:
      The weight files, without the index.

    Raises:
      ValueError: As `write_safetensors`, or if `max_shard_bytes` is not positive.
    """
    folder, tensors = pathlib.Path(folder), list(tensors)
    sizes = [num_bytes(array) for _, array in tensors]
    shards = plan_shards(sizes, max_shard_bytes)
    if len(shards) == 1:
        write_safetensors(folder / SINGLE_FILE, tensors, metadata)
        return [folder / SINGLE_FILE]
    weight_map: dict[str, str] = {}
    paths = []
    for number, shard in enumerate(shards, start=1):
        path = folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(path, tensors[shard], metadata)
        weight_map |= dict.fromkeys((name for name, _ in tensors[shard]), path.name)
        paths.append(path)
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    write_text(folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")
    return paths


def plan_shards(sizes: Sequence[int], max_bytes: int) -> list[slice]:
    """Cuts tensors of `sizes` bytes, in order, into shards of at most `max_bytes`; a larger one stands alone."""
    if max_bytes <= 0:
        raise ValueError(f"max_shard_bytes is {max_bytes}; a positive number of bytes is needed")
    shards, start, total = [], 0, 0
    for index, size in enumerate(sizes):
        if index > start and total + size > max_bytes:
            shards.append(slice(start, index))
            start, total = index, 0
        total += size
    return [*shards, slice(start, len(sizes))]


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a text file under a temporary name, then renames it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def summarise(title: str, items: Sequence[str]) -> str:
    """ "3 missing: a, b, c"; beyond 20 items the rest is counted."""
    text = f"{len(items)} {title}: " + ", ".join(items[:MAX_LISTED])
    return text if len(items) <= MAX_LISTED else f"{text} ... and {len(items) - MAX_LISTED} more"


def _read_index(folder: pathlib.Path) -> dict[str, str]:
    """The index's map from tensor to file name; every file is in the folder."""
    path = folder / INDEX_FILE
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path} has no weight_map")
    for name in sorted({str(value) for value in weight_map.values()}):
        _check_file_name(path, name)
    return {tensor: str(name) for tensor, name in weight_map.items()}


def _check_file_name(index: pathlib.Path, name: str) -> None:
    """Refuses a shard outside the folder: the index may come from anyone."""
    if name in ("", ".", "..") or any(mark in name for mark in "/\\:\0"):
        raise ValueError(f"{index} names the file {name!r}; only plain file names beside the index are allowed")
    folder = index.parent.resolve()
    roots = [folder]
    if folder.parent.name == "snapshots":
        # The hub's cache: the files of a snapshot are links into blobs/ beside snapshots/.
        roots.append(folder.parent.parent / "blobs")
    if (index.parent / name).resolve().parent not in roots:
        raise ValueError(f"{index} names the file {name!r}, a link that leads out of the folder")


def _compare_index(weight_map: Mapping[str, str], file_of: Mapping[str, str], opened: set[str]) -> list[str]:
    """What the index and the shards that could be opened do not agree on."""
    problems = [
        f"the index has tensor {tensor} in {name}, where it is not"
        for tensor, name in weight_map.items()
        if name in opened and file_of.get(tensor) != name
    ]
    return problems + [
        f"tensor {tensor} of {name} is not in the index" for tensor, name in file_of.items() if tensor not in weight_map
    ]
