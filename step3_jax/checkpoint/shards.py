"""A checkpoint folder: one `model.safetensors`, or shards with an index, seen as one set of tensors."""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import pathlib
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Shaped

from step3_jax.checkpoint.placement import Placement
from step3_jax.checkpoint.safetensors_io import (
    MAX_HEADER_BYTES,
    Index,
    SafetensorsFile,
    TensorInfo,
    Writable,
    check_name,
    check_regular,
    num_bytes,
    parse_json,
    write_safetensors,
)
from step3_jax.stored_file import START_BYTES, describe_stand_in

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_LISTED = 20
_SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.safetensors")


class Checkpoint:
    """All tensors of a folder, mapped for reading.

    Attributes:
      folder: The folder that holds them.
      tensors: Name -> dtype, shape and location.
      places: Name -> its location.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Opens the files of `folder` and checks all their headers.

        Raises:
          ValueError: If there are no weights, a file is damaged, or the index does not match its shards; the message lists
            all damage.
        """
        self.folder = pathlib.Path(folder)
        self._files, problems = open_files(self.folder)
        if problems:
            self.close()
            raise ValueError(f"{self.folder}: " + summarise("damaged", problems))
        self._file_of = {tensor: name for name, file in self._files.items() for tensor in file.tensors}
        self.tensors: dict[str, TensorInfo] = {}
        for file in self._files.values():
            self.tensors |= file.tensors
        self.places = {
            name: Placement(info.dtype, info.shape, self.folder / self._file_of[name], info.start)
            for name, info in self.tensors.items()
        }

    def read(self, name: str, index: Index = ...) -> Shaped[np.ndarray, "..."]:
        """A tensor, or a part of it, as a read-only view of the mapped file.

        Raises:
          ValueError: If there is no such tensor.
        """
        if name not in self._file_of:
            raise ValueError(f"{self.folder} has no tensor {name}")
        return self._files[self._file_of[name]].read(name, index)

    def path_of(self, name: str) -> pathlib.Path:
        """The file that has the tensor `name`.

        Raises:
          ValueError: If there is no such tensor.
        """
        if name not in self._file_of:
            raise ValueError(f"{self.folder} has no tensor {name}")
        return self.folder / self._file_of[name]

    def close(self) -> None:
        """Unmaps all files."""
        for file in self._files.values():
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_files(folder: pathlib.Path) -> tuple[dict[str, SafetensorsFile], list[str]]:
    """Opens the single weight file of a folder, or all shards that its index names, or all shards if it has none.

    Returns:
      The files that could be opened, by name, and all problems: files that cannot be read or are damaged, tensors
      that are in two files, disagreements between index and files.

    Raises:
      ValueError: If there are no weights, or the index cannot be used.
    """
    weight_map: dict[str, str] | None = None
    if (folder / SINGLE_FILE).exists():
        names = [SINGLE_FILE]
    elif (folder / INDEX_FILE).exists():
        weight_map = _read_index(folder)
        names = sorted(set(weight_map.values()))
    else:
        names = _find_shards(folder)
    problems: list[str] = []
    files: dict[str, SafetensorsFile] = {}
    file_of: dict[str, str] = {}
    for name in names:
        try:
            files[name] = SafetensorsFile(folder / name)
        except ValueError as error:
            problems.append(str(error))
            continue
        for tensor in files[name].tensors:
            if tensor in file_of:
                problems.append(f"tensor {tensor} is in {file_of[tensor]} and in {name}")
            file_of[tensor] = name
    if weight_map is not None:
        problems += _compare_index(weight_map, file_of, set(files))
    return files, problems


def _find_shards(folder: pathlib.Path) -> list[str]:
    """Names of all shards of a folder without an index.

    Raises:
      ValueError: If there are none, some are missing, or they belong to several sets.
    """
    found = sorted(path.name for path in folder.glob("*.safetensors") if not path.name.startswith("."))
    matches = [match for match in map(_SHARD_NAME.fullmatch, found) if match is not None]
    sets = {(match["stem"], match["total"]) for match in matches}
    if len(sets) == 1:
        ((stem, total),) = sets
        names = [match[0] for match in matches]
        # The number is untrusted: count the files that exist, not what it promises.
        numbers = {int(match["number"]) for match in matches}
        if numbers == set(range(1, len(numbers) + 1)) and len(numbers) == int(total):
            return names
        raise ValueError(
            f"{folder} holds {len(names)} of the {int(total)} shards {stem}-...-of-{total}.safetensors, and no "
            f"{INDEX_FILE}: " + ", ".join(names[:MAX_LISTED]) + "; download the others, or the index"
        )
    there = f"; there are {', '.join(found[:MAX_LISTED])}" if found else ""
    raise ValueError(
        f"{folder} holds no weights: neither {SINGLE_FILE} nor {INDEX_FILE} nor one whole set of shards is there{there}"
    )


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
      max_shard_bytes: A shard's tensors have at most this many bytes; a larger tensor gets its own shard.
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
    """Cuts tensors of `sizes` bytes, in order, into shards of at most `max_bytes`; a larger one gets its own."""
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
    """ "3 missing: a, b, c"; items after the first 20 are only counted."""
    text = f"{len(items)} {title}: " + ", ".join(items[:MAX_LISTED])
    return text if len(items) <= MAX_LISTED else f"{text} ... and {len(items) - MAX_LISTED} more"


def _read_index(folder: pathlib.Path) -> dict[str, str]:
    """The index's map from tensor to file name; every file is in the folder."""
    path = folder / INDEX_FILE
    check_regular(path)
    try:
        with path.open("rb") as file:
            text = file.read(MAX_HEADER_BYTES + 1)
        if len(text) > MAX_HEADER_BYTES:
            raise ValueError(f"it has more than {MAX_HEADER_BYTES} bytes")
        what = describe_stand_in(text[:START_BYTES])
        if what is not None:
            raise ValueError(f"it is {what}")
        index = parse_json(text.removeprefix(codecs.BOM_UTF8))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path} has no weight_map")
    for tensor, name in weight_map.items():
        check_name(str(path), tensor)
        if not isinstance(name, str):
            raise ValueError(f"{path} gives {reprlib.repr(name)} for {tensor}; a file name is needed")
    for name in sorted(set(weight_map.values())):
        _check_file_name(path, name)
    return weight_map


def _check_file_name(index: pathlib.Path, name: str) -> None:
    """Refuses a shard that the index names outside the folder: the index is untrusted.

    A link in the folder is followed, wherever it leads: anyone who can put it there can put the file there.
    """
    if name in ("", ".", "..") or any(mark in name for mark in "/\\:") or len(name) > 255 or not name.isprintable():
        raise ValueError(
            f"{index} names the file {reprlib.repr(name)}; only plain file names next to the index are allowed"
        )


def _compare_index(weight_map: Mapping[str, str], file_of: Mapping[str, str], opened: set[str]) -> list[str]:
    """Disagreements between the index and the shards that could be opened."""
    problems = [
        f"the index has tensor {tensor} in {name}, where it is not"
        for tensor, name in weight_map.items()
        if name in opened and file_of.get(tensor) != name
    ]
    return problems + [
        f"tensor {tensor} of {name} is not in the index" for tensor, name in file_of.items() if tensor not in weight_map
    ]
