"""What a checkpoint holds, and whether it matches its configuration. Only headers are read, never weights.

Handles the released layout, a single safetensors file, and our Orbax form.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import os
import pathlib
import re
from collections.abc import Iterable

from step3_jax.checkpoint.load import find_differences, has_vision
from step3_jax.checkpoint.names import SCALE_SUFFIX, is_fp8_tensor, our_path
from step3_jax.checkpoint.orbax_io import OrbaxCheckpoint, is_orbax
from step3_jax.checkpoint.placement import Placement, as_matrices
from step3_jax.checkpoint.reader import FP8_DTYPE
from step3_jax.checkpoint.safetensors_io import DTYPES, SafetensorsFile, TensorInfo
from step3_jax.checkpoint.shards import INDEX_FILE, SINGLE_FILE, open_files
from step3_jax.config import ModelConfig
from step3_jax.stored_file import download_advice

PARTS = ("text", "vision", "projector", "other")
_NUMBER = re.compile(r"\.(0|[1-9][0-9]{0,8})\.")


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """One file of weights, or the folder of one array.

    Attributes:
      tensors: Names, in file order.
      num_bytes: Length, including headers.
      disk_bytes: Space it takes on the disk; less than `num_bytes` if it has holes.
    """

    tensors: tuple[str, ...]
    num_bytes: int
    disk_bytes: int


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
      path: The folder or file.
      config: The intended model; None if there is no usable `config.json`.
      tensors: Name -> dtype, shape and location.
      form: "released layout" or "Orbax".
      files: Weight files by name; for Orbax the folders of the arrays.
      problems: What keeps the folder from being that model: a title for each kind, and all its cases.
      notes: Things worth knowing that are not errors.
    """

    path: pathlib.Path
    config: ModelConfig | None
    tensors: dict[str, TensorInfo]
    form: str
    files: dict[str, WeightFile]
    problems: dict[str, list[str]]
    notes: list[str]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.num_bytes for info in self.tensors.values())

    @property
    def parameters(self) -> dict[str, int]:
        """Parameters of each of `PARTS`, and their "total". Scales do not count."""
        counts = dict.fromkeys(PARTS, 0)
        for name, info in self.tensors.items():
            if not name.endswith(SCALE_SUFFIX):
                counts[_part(name)] += math.prod(info.shape)
        return counts | {"total": sum(counts.values())}

    @property
    def dtypes(self) -> dict[str, tuple[int, int]]:
        """Tensors and bytes of each dtype, the largest first."""
        counts: dict[str, tuple[int, int]] = {}
        for info in self.tensors.values():
            num_tensors, num_bytes = counts.get(info.dtype, (0, 0))
            counts[info.dtype] = num_tensors + 1, num_bytes + info.num_bytes
        return dict(sorted(counts.items(), key=lambda item: -item[1][1]))

    @property
    def num_fp8(self) -> int:
        """The FP8 tensors."""
        return sum(info.dtype == FP8_DTYPE for info in self.tensors.values())

    @property
    def num_quantisable(self) -> int:
        """Tensors that the FP8 release quantises."""
        return sum(_part(name) == "text" and _is_quantisable(name) for name in self.tensors)


def inspect_checkpoint(path: str | os.PathLike[str]) -> Inspection:
    """Reads the headers of a checkpoint and compares them with its `config.json`.

    Args:
      path: A model folder in the released layout or in our Orbax form; or one safetensors file, of which only the
        contents are checked, against the `config.json` next to it if there is one.

    Returns:
      What was found, including damage.

    Raises:
      ValueError: If there is nothing at `path`, or it cannot be a checkpoint.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        has_item = is_orbax(path)
        tensors, files, damage = _read_orbax(path) if has_item else _read_files(*open_files(path))
        form = "Orbax" if has_item else "released layout"
        return _report(path, path, form, tensors, files, damage, is_whole=True)
    if path.suffix == ".safetensors" and path.exists():
        tensors, files, damage = _read_files(*_open_file(path))
        is_whole = path.name == SINGLE_FILE
        return _report(path, path.parent, "released layout", tensors, files, damage, is_whole=is_whole)
    if path.exists():
        raise ValueError(f"{path} is not a checkpoint: give a model folder or a .safetensors file")
    advice = download_advice(path) or "; give a model folder or a .safetensors file"
    raise ValueError(f"there is nothing at {path}{advice}")


def collapse(items: Iterable[str]) -> list[str]:
    """Merges lines that differ only in their layer: "model.layers.{0-3,60}.mlp.up_proj.weight"."""
    groups: dict[tuple[str, str], list[int]] = collections.defaultdict(list)
    result: dict[tuple[str, str], str | None] = {}
    for item in items:
        match = _NUMBER.search(item)
        key = (item[: match.start()], item[match.end() :]) if match else (item, "")
        result[key] = None if match else item
        if match:
            groups[key].append(int(match[1]))
    return [
        line if line is not None else f"{head}.{_ranges(groups[head, tail])}.{tail}"
        for (head, tail), line in result.items()
    ]


def _report(
    path: pathlib.Path,
    folder: pathlib.Path,
    form: str,
    tensors: dict[str, TensorInfo],
    files: dict[str, WeightFile],
    damage: list[str],
    *,
    is_whole: bool,
) -> Inspection:
    problems = {"files damaged": damage} if damage else {}
    notes = _note_holes(files)
    if path.is_dir() and form == "released layout":
        notes += _note_unread(folder, files)
    config = None
    if path.is_dir() or (folder / "config.json").exists():
        try:
            config = ModelConfig.load(folder)
        except ValueError as error:
            problems["config.json"] = [str(error)]
    else:
        notes.append("there is no config.json next to it, so nothing could be compared")
    if config is not None:
        config = _compare(tensors, config, problems, notes, is_whole=is_whole)
    return Inspection(path, config, tensors, form, files, problems, notes)


def _open_file(path: pathlib.Path) -> tuple[dict[str, SafetensorsFile], list[str]]:
    try:
        return {path.name: SafetensorsFile(path)}, []
    except ValueError as error:
        return {}, [str(error)]


def _read_files(
    opened: dict[str, SafetensorsFile], damage: list[str]
) -> tuple[dict[str, TensorInfo], dict[str, WeightFile], list[str]]:
    try:
        files = {}
        for name, file in opened.items():
            found = file.path.stat()
            files[name] = WeightFile(tuple(file.tensors), found.st_size, _disk_bytes(found))
        tensors = {name: info for file in opened.values() for name, info in file.tensors.items()}
    finally:
        for file in opened.values():
            file.close()
    return tensors, files, damage


def _read_orbax(folder: pathlib.Path) -> tuple[dict[str, TensorInfo], dict[str, WeightFile], list[str]]:
    files: dict[str, WeightFile] = {}
    damage: list[str] = []
    with OrbaxCheckpoint(folder) as checkpoint:
        for name, place in checkpoint.places.items():
            if isinstance(place, Placement):
                # Reading a missing chunk would give zeros.
                files[place.path.name] = _read_chunks(name, place, damage)
            else:
                files[name] = WeightFile((name,), place.num_bytes, place.num_bytes)
        return checkpoint.tensors, files, damage


def _read_chunks(name: str, place: Placement, damage: list[str]) -> WeightFile:
    """Adds to `damage` what is wrong with the number and the lengths of an array's chunk files."""
    sizes = as_matrices(place.shape)
    chunk = place.chunk or sizes
    num_chunks = math.prod(-(-size // part) for size, part in zip(sizes, chunk, strict=True))
    chunk_bytes = math.prod(chunk) * DTYPES[place.dtype].itemsize
    num_bytes = disk_bytes = num_found = 0
    wrong = []
    for entry in os.scandir(place.path):
        found = entry.stat()
        num_bytes, disk_bytes = num_bytes + found.st_size, disk_bytes + _disk_bytes(found)
        if entry.name[0].isdigit():
            num_found += 1
            if found.st_size != chunk_bytes:
                wrong.append(f"{entry.path} has {found.st_size} bytes, {chunk_bytes} needed")
    if num_found != num_chunks:
        wrong.append(f"{place.path} has {num_found} chunk files, {num_chunks} needed")
    damage += sorted(wrong)
    return WeightFile((name,), num_bytes, disk_bytes)


def _disk_bytes(found: os.stat_result) -> int:
    # Windows does not count blocks.
    return getattr(found, "st_blocks", -(-found.st_size // 512)) * 512


def _compare(
    tensors: dict[str, TensorInfo],
    config: ModelConfig,
    problems: dict[str, list[str]],
    notes: list[str],
    *,
    is_whole: bool,
) -> ModelConfig:
    """Adds mismatches to `problems` and `notes`; returns the configuration of what is there."""
    if is_whole and config.vision is not None and not has_vision(tensors):
        notes.append("it has no vision tensors, so it loads as a text-only model")
        config = dataclasses.replace(config, vision=None)
    differences = find_differences(tensors, config)
    if not is_whole:
        # The other tensors may be in other files, and so may the weights of these scales.
        for title, items in differences.items():
            kept = [] if title.endswith("missing") else [name for name in items if not name.endswith(SCALE_SUFFIX)]
            problems |= {title: kept} if kept else {}
    else:
        problems |= differences
    has_fp8 = any(info.dtype == FP8_DTYPE for info in tensors.values())
    if has_fp8 and config.quantization is None:
        problems["FP8"] = ["config.json has no quantization_config, although there are FP8 tensors"]
    if config.quantization is not None and not has_fp8 and is_whole:
        notes.append("config.json has a quantization_config, but no tensor is FP8")
    return config


def _note_unread(folder: pathlib.Path, files: dict[str, WeightFile]) -> list[str]:
    unread = sorted(file.name for file in folder.glob("*.safetensors") if file.name not in files)
    if (folder / SINGLE_FILE).exists() and (folder / INDEX_FILE).exists():
        return [f"there are {SINGLE_FILE} and {INDEX_FILE}; the former is read, the shards are ignored"]
    if files and not (folder / SINGLE_FILE).exists() and not (folder / INDEX_FILE).exists():
        return [f"there is no {INDEX_FILE}; the shards are found by their names"]
    if not unread:
        return []
    more = f" and {len(unread) - 5} more" if len(unread) > 5 else ""
    return [f"not read, because the index does not name them or they are damaged: {', '.join(unread[:5])}{more}"]


def _note_holes(files: dict[str, WeightFile]) -> list[str]:
    held, length = sum(file.disk_bytes for file in files.values()), sum(file.num_bytes for file in files.values())
    # Some file systems compress or count in other blocks: slightly less does not mean a hole.
    if held >= 0.5 * length:
        return []
    return [f"the files have holes: {held:,} of {length:,} bytes are on the disk, the rest reads as zeros"]


def _part(name: str) -> str:
    try:
        return str(our_path(name.removesuffix(SCALE_SUFFIX))[0])
    except ValueError:
        return "other"


def _is_quantisable(name: str) -> bool:
    return not name.endswith(SCALE_SUFFIX) and is_fp8_tensor(name)


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "{0-2,5}"; a single number is unchanged."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return "{" + ",".join(f"{low}-{high}" if high > low else str(low) for low, high in runs) + "}"
