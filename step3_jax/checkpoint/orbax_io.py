"""The Orbax form of a checkpoint: a model folder with the weights as an Orbax item in `weights/`.

Orbax writes only whole arrays; a stack of experts is 3.5 GB. So the item is made here, in the plainest layout that Orbax
restores: one folder per array, uncompressed Zarr chunks, a list of the arrays. Chunks are cut along the axes that meshes
shard, so that a process reads the bytes of its own shards and hardly more.

The tree is `Step3`'s parameters as nested dicts; a quantised weight is {"values", "scales"}. Items that Orbax
wrote itself (in a training run) are read too, through tensorstore.
"""

from __future__ import annotations

import ast
import json
import os
import pathlib
from collections.abc import Mapping

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding
from jaxtyping import Array, PyTree, Shaped

from step3_jax.checkpoint.names import SCALE_SUFFIX, axis_symbols, our_path, released_name, scale_name
from step3_jax.checkpoint.placement import Matrices, Placement, as_matrices
from step3_jax.checkpoint.safetensors_io import DTYPES, Index, TensorInfo
from step3_jax.checkpoint.shards import INDEX_FILE, SINGLE_FILE
from step3_jax.checkpoint.zarr_array import HEADER_FILE, StoredArray, open_array, read_chunks, read_json, zarr_header
from step3_jax.layout.tensor import Path
from step3_jax.quant import BlockScaled

WEIGHTS = "weights"
TREE_FILE = "_METADATA"
ABOUT_FILE = "_CHECKPOINT_METADATA"
# Axes that meshes shard: experts, expert widths, dense and shared widths, query heads, vocabulary, the tower's MLP.
DIVIDED = frozenset("EFGIQVM")
NUM_PARTS = 8
SMALL_BYTES = 2**20
MAX_CHUNK_BYTES = 2**25
# Where an item may be: the folder itself, ours, and the names that training and checkpoint managers use.
ITEM_NAMES = ("", WEIGHTS, "state", "default", "params")


class OrbaxCheckpoint:
    """The weights of an Orbax item by their released names; has the interface of `shards.Checkpoint`.

    Attributes:
      folder: The item.
      tensors: Name -> dtype, shape and bytes.
      places: Name -> its location.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Finds the item in `folder` (see `find_item`) and the model's parameters in it.

        Raises:
          ValueError: If there is no item, it is damaged, or it holds no parameters of `Step3`.
        """
        item = find_item(pathlib.Path(folder))
        if item is None:
            raise ValueError(f"{folder} has no Orbax checkpoint: there is no {TREE_FILE} in it or in {WEIGHTS}/")
        self.folder = item
        tree = read_json(item / TREE_FILE)
        keys = _tree_keys(tree, item)
        names = {name: keys[key] for key, name in _parameter_names(keys, item).items()}
        self.places: dict[str, Placement | StoredArray] = {
            name: open_array(item, ".".join(names[name]), tree) for name in names
        }
        self.tensors = {
            name: TensorInfo(place.dtype, place.shape, 0, place.num_bytes) for name, place in self.places.items()
        }

    def read(self, name: str, index: Index = ...) -> Shaped[np.ndarray, "..."]:
        """A tensor, or a part of it; only the chunks that hold it are read.

        Raises:
          ValueError: If there is no such tensor, or a chunk of it is missing or truncated.
        """
        if name not in self.places:
            raise ValueError(f"{self.folder} has no tensor {name}")
        place = self.places[name]
        slices, drop = _slices(index, place.shape)
        values = place.read_index(slices) if isinstance(place, StoredArray) else read_chunks(place, slices)
        return values[tuple(0 if dropped else slice(None) for dropped in drop)]

    def close(self) -> None:
        """Does nothing, as nothing is kept open; for symmetry with `shards.Checkpoint`."""

    def __enter__(self) -> OrbaxCheckpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_orbax(folder: pathlib.Path) -> bool:
    """Whether a folder's weights are read as an Orbax item: it has one, and nothing in the released layout."""
    return not any((folder / name).exists() for name in (SINGLE_FILE, INDEX_FILE)) and find_item(folder) is not None


def find_item(folder: pathlib.Path) -> pathlib.Path | None:
    """The Orbax item of a model folder, a training run's folder, a checkpoint manager's, or a step's; None if none."""
    for root in (folder, _newest_step(folder), _newest_step(folder / "checkpoints")):
        if root is not None:
            for name in ITEM_NAMES:
                if (root / name / TREE_FILE).is_file():
                    return root / name
    return None


def chunk_shape(name: str, shape: tuple[int, ...], itemsize: int) -> Matrices:
    """The chunk shape of a tensor: sharded axes in eight parts, no chunk over 32 MiB, small tensors in one piece.

    Args:
      name: Released name.
      shape: Shape of the tensor.
      itemsize: Bytes per element.
    """
    matrices, rows, columns = as_matrices(shape)
    if matrices * rows * columns * itemsize <= SMALL_BYTES:
        return matrices, rows, columns
    symbols = axis_symbols(name.removesuffix(SCALE_SUFFIX))
    if len(shape) in (2, 3):
        if symbols[-1] in DIVIDED and columns % NUM_PARTS == 0:
            columns //= NUM_PARTS
        if symbols[-2] in DIVIDED and rows % NUM_PARTS == 0:
            rows //= NUM_PARTS
    while rows > 1 and rows * columns * itemsize > MAX_CHUNK_BYTES:
        rows = -(-rows // 2)
    return 1, rows, columns


def tree_path(name: str) -> tuple[str, ...]:
    """Keys of a released tensor in the Orbax tree; `is_fp8` distinguishes values and scales of an FP8 weight."""
    if name.endswith(SCALE_SUFFIX):
        return (*tree_path(name.removesuffix(SCALE_SUFFIX)), "scales")
    return tuple(str(part) for part in our_path(name))


def place_arrays(tensors: Mapping[str, tuple[str, tuple[int, ...]]], item: pathlib.Path) -> dict[str, Placement]:
    """Where each tensor goes in an item; nothing is written.

    Args:
      tensors: Released name -> dtype and shape.
      item: Folder of the item.
    """
    places = {}
    for name, (dtype, shape) in tensors.items():
        path = (*tree_path(name), "values") if scale_name(name) in tensors else tree_path(name)
        chunk = chunk_shape(name, shape, DTYPES[dtype].itemsize)
        places[name] = Placement(dtype, shape, item / ".".join(path), 0, chunk)
    return places


def write_item(places: Mapping[str, Placement], item: pathlib.Path) -> None:
    """Creates the item around the chunk files: array folders with their Zarr headers, and Orbax's list of the arrays.

    The caller syncs it to the disk and renames it.
    """
    entries = {}
    for place in places.values():
        place.path.mkdir(parents=True, exist_ok=True)
        (place.path / HEADER_FILE).write_text(json.dumps(zarr_header(place)), encoding="utf-8")
        keys = tuple(place.path.name.split("."))
        entries[str(keys)] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],
            "value_metadata": {
                # The type it is restored as without a sharding; with "jax.Array" that would be an error.
                "value_type": "np.ndarray",
                "skip_deserialize": False,
                "write_shape": list(place.shape),
            },
        }
    tree = {
        "tree_metadata": entries,
        "use_ocdbt": False,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    # Without this file Orbax warns at each restore.
    about: dict[str, object] = {
        "item_handlers": None,
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": None,
        "commit_timestamp_nsecs": None,
        "custom_metadata": {},
    }
    (item / ABOUT_FILE).write_text(json.dumps(about), encoding="utf-8")
    (item / TREE_FILE).write_text(json.dumps(tree), encoding="utf-8")


def restore_parameters(
    folder: str | os.PathLike[str], shardings: Mapping[Path, NamedSharding], *, block: tuple[int, int] = (128, 128)
) -> dict[Path, Array | BlockScaled]:
    """Restores some parameters with Orbax, straight to their devices: a text-only model, or one of several roles.

    Args:
      folder: As for `OrbaxCheckpoint`; one of ours, whose tree is the model's.
      shardings: Where each wanted parameter goes, by its path in the model; the others are not read.
      block: Rows and columns of a block of FP8 weights, as in config.json.

    Returns:
      The parameters in their stored dtype.

    Raises:
      ValueError: If the checkpoint has no such parameter, or is not one of ours.
    """
    checkpoint = OrbaxCheckpoint(folder)
    wanted: PyTree = {}
    for path, sharding in shardings.items():
        name = released_name(path)
        if name not in checkpoint.tensors:
            raise ValueError(f"{checkpoint.folder} has no tensor {name}")
        if len(sharding.spec) > len(checkpoint.tensors[name].shape):
            raise ValueError(
                f"{name} is sharded across heads, which are not an axis of the stored tensor; load_model can read it so"
            )
        scales = scale_name(name)
        for part in (name, scales) if scales in checkpoint.tensors else (name,):
            info = checkpoint.tensors[part]
            keys = (*tree_path(part), "values") if part == name and scales in checkpoint.tensors else tree_path(part)
            place = checkpoint.places[part]
            if not isinstance(place, Placement) or place.path.name != ".".join(keys):
                raise ValueError(f"{checkpoint.folder} was not made by `step3 convert`; convert it first")
            _insert(wanted, keys, jax.ShapeDtypeStruct(info.shape, DTYPES[info.dtype], sharding=sharding))
    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(
            checkpoint.folder.absolute(),
            args=ocp.args.PyTreeRestore(
                item=wanted,
                restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
                partial_restore=True,
            ),
        )
    return {path: _take(restored, path, block) for path in shardings}


def _take(tree: PyTree, path: Path, block: tuple[int, int]) -> Array | BlockScaled:
    for part in path:
        tree = tree[str(part)]
    if not isinstance(tree, dict):
        return tree
    return BlockScaled(tree["values"], tree["scales"], block)


def _insert(tree: PyTree, keys: tuple[str, ...], leaf: jax.ShapeDtypeStruct) -> None:
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
    tree[keys[-1]] = leaf


def _parameter_names(keys: Mapping[str, list[str]], item: pathlib.Path) -> dict[str, str]:
    """Entry of the tree -> released name, for the one part of the tree that is the model's parameters.

    A training state also has the optimiser's moments, in trees of the same structure.
    """
    groups: dict[tuple[str, ...], dict[str, str]] = {}
    for entry, path in keys.items():
        found = _released(path)
        if found is not None:
            prefix, name = found
            groups.setdefault(prefix, {})[entry] = name
    groups = {prefix: names for prefix, names in groups.items() if "optimizer" not in prefix}
    if not groups:
        raise ValueError(f"{item} has no parameters of Step3")
    most = max(len(names) for names in groups.values())
    best = [prefix for prefix, names in groups.items() if len(names) == most]
    if len(best) > 1:
        shown = ", ".join(".".join(prefix) or "(top)" for prefix in best)
        raise ValueError(f"{item} has several sets of parameters ({shown}), and nothing says which is the model")
    return groups[best[0]]


def _released(path: list[str]) -> tuple[tuple[str, ...], str] | None:
    """Prefix before the model's tree, and the released name; None for an entry that is not a parameter."""
    suffix = ""
    if path[-1] == "scales":
        path, suffix = path[:-1], SCALE_SUFFIX
    elif path[-1] in ("values", "value"):
        path = path[:-1]
    for start in range(len(path)):
        try:
            return tuple(path[:start]), released_name(tuple(path[start:])) + suffix
        except ValueError:
            continue
    return None


def _slices(index: Index, shape: tuple[int, ...]) -> tuple[tuple[slice, ...], tuple[bool, ...]]:
    """A basic index as one slice per axis, and the axes that an integer removed."""
    items = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in items:
        place = next(number for number, item in enumerate(items) if item is Ellipsis)
        items[place : place + 1] = [slice(None)] * (len(shape) - len(items) + 1)
    items += [slice(None)] * (len(shape) - len(items))
    slices = []
    for item, length in zip(items, shape, strict=True):
        if isinstance(item, slice):
            start, stop, _ = item.indices(length)
            slices.append(slice(start, max(start, stop)))
        else:
            slices.append(slice(int(item) % length, int(item) % length + 1))  # type: ignore[arg-type]
    return tuple(slices), tuple(not isinstance(item, slice) for item in items)


def _newest_step(folder: pathlib.Path) -> pathlib.Path | None:
    """The newest step of a checkpoint manager's folder."""
    if not folder.is_dir():
        return None
    steps = [entry for entry in folder.iterdir() if entry.name.isdigit() and entry.is_dir()]
    return max(steps, key=lambda entry: int(entry.name), default=None)


def _tree_keys(tree: Mapping[str, object], item: pathlib.Path) -> dict[str, list[str]]:
    """Entry of the tree -> its keys, which become file names here and are untrusted."""
    entries = tree.get("tree_metadata")
    if not isinstance(entries, dict):
        raise ValueError(f"{item / TREE_FILE} is damaged: it has no tree_metadata")
    keys = {}
    for entry in entries:
        try:
            keys[entry] = [str(key) for key in ast.literal_eval(entry)]
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            raise ValueError(f"{item / TREE_FILE} is damaged: {entry[:100]!r} is not a list of keys") from None
        if not keys[entry] or any(mark in key for key in keys[entry] for mark in "/\\\0"):
            raise ValueError(f"{item / TREE_FILE} names {entry[:100]!r}; only plain names are allowed")
    return keys
