"""A checkpoint as conversion sees it: recognised by the files in its folder, read band by band."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Iterator, Mapping

from step3_jax.checkpoint.load import IGNORED_SUFFIXES, find_problems, has_vision
from step3_jax.checkpoint.orbax_io import WEIGHTS, OrbaxCheckpoint, find_item, is_orbax
from step3_jax.checkpoint.placement import Placement
from step3_jax.checkpoint.reader import FP8_DTYPE
from step3_jax.checkpoint.shards import INDEX_FILE, Checkpoint
from step3_jax.checkpoint.zarr_array import StoredArray
from step3_jax.config import ModelConfig
from step3_jax.stored_file import START_BYTES, TEMPLATE_FOLDERS, describe_stand_in, require_folder

CONFIG_FILE = "config.json"
# Files that belong to the weights are small; anything else is the user's own, or weights in another form.
MAX_COMPANION_BYTES = 100 * 10**6
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")


@dataclasses.dataclass(frozen=True)
class Source:
    """An opened checkpoint.

    Attributes:
      folder: As given.
      form: "hf" for the released layout, "orbax".
      config: The model's; text-only if there are no vision tensors.
      config_path: The file it was read from.
      tensors: Released name -> where to read it, without tensors that the model does not use.
      companions: Tokenizer, templates and other files that are copied.
      left_out: Names of entries next to them that are not.
    """

    folder: pathlib.Path
    form: str
    config: ModelConfig
    config_path: pathlib.Path
    tensors: Mapping[str, Placement | StoredArray]
    companions: tuple[pathlib.Path, ...]
    left_out: tuple[str, ...]

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns that share a scale."""
        return self.config.quantization.weight_block_size if self.config.quantization is not None else (128, 128)

    @property
    def num_bytes(self) -> int:
        return sum(place.num_bytes for place in self.tensors.values())

    @property
    def companion_names(self) -> dict[str, pathlib.Path]:
        """The companions by their names in their folder."""
        return {path.relative_to(self.config_path.parent).as_posix(): path for path in self.companions}

    def describe(self) -> str:
        """ "released layout, BF16, 1663 tensors"."""
        kinds = {place.dtype for place in self.tensors.values()}
        dtypes = "block-FP8" if FP8_DTYPE in kinds else " and ".join(sorted(kinds))
        form = "released layout" if self.form == "hf" else "Orbax"
        return f"{form}, {dtypes}, {len(self.tensors)} tensors"

    def fingerprint(self) -> dict[str, str]:
        """One text for each weight file (each array, for Orbax) and for the configuration, which changes when the file does.

        Raises:
          OSError: If a file has vanished.
        """
        prints: dict[str, hashlib._Hash] = {}
        for title, path in self._weight_files():
            status = path.stat()
            digest = prints.setdefault(title, hashlib.sha256())
            digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
            if path.suffix == ".safetensors":
                digest.update(_header(path))
        prints[CONFIG_FILE] = hashlib.sha256(self.config_path.read_bytes())
        return {title: digest.hexdigest()[:16] for title, digest in prints.items()}

    def _weight_files(self) -> Iterator[tuple[str, pathlib.Path]]:
        if self.form == "hf":
            for path in sorted({place.path for place in self.tensors.values() if isinstance(place, Placement)}):
                yield path.name, path
            return
        item = find_item(self.folder)
        for root, folders, files in os.walk(item or self.folder):
            folders.sort()
            for name in sorted(files):
                path = pathlib.Path(root) / name
                yield path.relative_to(item or self.folder).parts[0], path


def open_source(folder: str | os.PathLike[str], companions: str | os.PathLike[str] | None = None) -> Source:
    """Recognises a checkpoint and checks that it matches its configuration.

    Args:
      folder: A model folder in the released layout or in our Orbax form, or a training run's folder.
      companions: Folder with config.json, tokenizer and templates, where `folder` has none (a training run).

    Returns:
      The checkpoint; only headers have been read.

    Raises:
      ValueError: If it is not a checkpoint, or tensors are missing, superfluous, damaged or of the wrong shape.
    """
    folder = require_folder(folder)
    beside = folder if companions is None else pathlib.Path(companions)
    tensors: dict[str, Placement | StoredArray]
    if is_orbax(folder):
        form = "orbax"
        with OrbaxCheckpoint(folder) as restored:
            tensors, infos = dict(restored.places), restored.tensors
    else:
        form = "hf"
        with Checkpoint(folder) as checkpoint:
            tensors, infos = dict(checkpoint.places), checkpoint.tensors
    if not (beside / CONFIG_FILE).exists():
        raise ValueError(
            f"{beside} has no {CONFIG_FILE}; name a folder that has it and the tokenizer (--companions FOLDER)"
        )
    config = ModelConfig.load(beside)
    if config.vision is not None and not has_vision(tensors):
        config = dataclasses.replace(config, vision=None)
    problems = find_problems(infos, config)
    if problems:
        raise ValueError(f"{folder} does not match its {CONFIG_FILE}: " + "; ".join(problems))
    tensors = {name: place for name, place in tensors.items() if not name.endswith(IGNORED_SUFFIXES)}
    travelling, left_out = _find_companions(beside)
    return Source(folder, form, config, beside / CONFIG_FILE, tensors, travelling, left_out)


def _find_companions(folder: pathlib.Path) -> tuple[tuple[pathlib.Path, ...], tuple[str, ...]]:
    """Files that are copied, and the names of those left out. Weights and their folders are neither."""
    travelling, left_out = [], []
    entries = sorted(folder.iterdir())
    for name in TEMPLATE_FOLDERS:
        if (folder / name) in entries and (folder / name).is_dir():
            entries.remove(folder / name)
            entries += sorted((folder / name).iterdir())
    for entry in entries:
        if entry.name.startswith(".") or entry.name in (CONFIG_FILE, INDEX_FILE, WEIGHTS):
            continue
        if entry.suffix in WEIGHT_SUFFIXES:
            continue
        if not entry.is_file() or entry.stat().st_size > MAX_COMPANION_BYTES or _leads_out(entry, folder):
            left_out.append(entry.relative_to(folder).as_posix())
            continue
        if entry.suffix in (".json", ".jinja"):
            with entry.open("rb") as file:
                what = describe_stand_in(file.read(START_BYTES))
            if what is not None:
                raise ValueError(f"{entry} is {what}")
        travelling.append(entry)
    return tuple(travelling), tuple(left_out)


def _leads_out(entry: pathlib.Path, folder: pathlib.Path) -> bool:
    """Whether a link leads outside the folder: a downloaded folder must not take other files along."""
    folder, target = folder.resolve(), entry.resolve()
    if folder.parent.name == "snapshots" and target.parent == folder.parent.parent / "blobs":
        # The hub's cache: the files of a snapshot are links into blobs/, next to snapshots/.
        return False
    return not target.is_relative_to(folder)


def _header(path: pathlib.Path) -> bytes:
    """Header of a safetensors file, which has been checked before."""
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))
