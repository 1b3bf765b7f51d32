"""Loads a checkpoint: everything is checked first, then tensors go band by band from the disk to their devices.

`host` loads weights for a CPU. For accelerators, host memory never holds the whole model, only, for each
thread, one slice (one expert of a stack, one matrix, or a device's part of it) and its copy in the target dtype.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import logging
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Shaped
from tqdm import tqdm

from step3_jax import resources
from step3_jax.checkpoint.form_choice import Place, choose_form
from step3_jax.checkpoint.host import HostLoader
from step3_jax.checkpoint.mapped import MappedFiles, find_obstacle
from step3_jax.checkpoint.memory import available_bytes, format_bytes
from step3_jax.checkpoint.names import (
    SCALE_SUFFIX,
    expected_tensors,
    is_fp8_tensor,
    is_vision_tensor,
    parameters_of,
    released_name,
    scale_name,
)
from step3_jax.checkpoint.orbax_io import OrbaxCheckpoint, is_orbax
from step3_jax.checkpoint.reader import FP8_DTYPE, TensorReader
from step3_jax.checkpoint.safetensors_io import DTYPES, TensorInfo
from step3_jax.checkpoint.shards import Checkpoint, summarise
from step3_jax.checkpoint.stack_filler import StackFiller
from step3_jax.checkpoint.view import read_view
from step3_jax.config import DTYPES as MODEL_DTYPES
from step3_jax.config import ModelConfig, QuantConfig, VisionConfig
from step3_jax.cpu_kernels.api import FP8_BLOCKS
from step3_jax.cpu_kernels.loader import Kernels, Unavailable, find_kernels
from step3_jax.gpu import claim_memory
from step3_jax.layout.parallel import fit_parallel
from step3_jax.layout.role import is_ffn
from step3_jax.layout.table import view_shape
from step3_jax.layout.tensor import Path, scale_shape
from step3_jax.mesh import Layout, find_devices, padded_shape
from step3_jax.model.arrangement import Arrangement, arrange
from step3_jax.model.step3 import Step3, abstract_step3
from step3_jax.quant import BlockScaled
from step3_jax.stored_file import require_folder

_LOGGER = logging.getLogger(__name__)

NUM_READERS = 4
PLAIN_DTYPES = ("BF16", "F32", "F16", "F64")
# The release has float32; some tools store scales like other tensors, or as powers of two. All become float32.
SCALE_DTYPES = (*PLAIN_DTYPES, "F8_E8M0")
# Buffers that old tools store although they follow from the configuration.
IGNORED_SUFFIXES = (
    "rotary_emb.inv_freq",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
    "position_ids",
)


def load_model(
    path: str | os.PathLike[str],
    dtype: jax.typing.DTypeLike | None = None,
    *,
    quantization: str = "auto",
    load_format: str = "auto",
    shardings: Mapping[Path, NamedSharding] | None = None,
    layout: Layout | None = None,
    arrangement: Arrangement | None = None,
    text_only: bool = False,
    progress: bool = False,
) -> Step3:
    """Loads a model folder in the released layout, or in the Orbax form that `step3 convert` writes.

    Args:
      path: Folder with `config.json` and `model.safetensors`, or shards and their index, or `weights/`. A checkpoint
        without any vision tensors gives a text-only model.
      dtype: "float32" or "bfloat16", for activations and for weights without a quantised form; the
        configuration's if absent.
      quantization: How linear weights are held. "none": in `dtype`, dequantised here. "stored": FP8 and, on a CPU whose
        kernels take it, bfloat16 as in the file. "fp8", "int8", "int4": quantised here, tensor by tensor, if they are
        not yet; only on CPUs. "auto": "stored" where the device's kernels multiply it, else "none".
      load_format: "auto" copies. "mmap", on a CPU, leaves weights that need no change in their file, which must not be
        modified.
      shardings: Where each parameter goes, by its path in the model (see `names`); each host then reads only the parts
        its devices hold. One with more axes than the tensor shards its heads, see `layout.table.view_shape`. If absent,
        everything goes to the default device.
      layout: The same, from a parallel setting: head and vision tower are padded with zeros where they do not divide.
      arrangement: How the decoder's layers are arranged; by default as is best for the devices, see `Arrangement.of`.
      text_only: Whether to skip the vision tower and the projector.
      progress: Whether to show a bar with bytes and rate.

    Returns:
      The model; `model.config` says its dtype, whether it is text-only and whether it is quantised.

    Raises:
      ValueError: If `path` is not a model folder, the configuration is wrong, or tensors are missing, superfluous, damaged,
        of the wrong shape or dtype: all of them are listed. Also if the layout does not divide the model.
    """
    claim_memory()
    if shardings is not None and layout is not None:
        raise ValueError("shardings and layout both say where parameters go: give one of them")
    # Says what is missing if JAX_PLATFORMS names a platform that is not there.
    find_devices()
    folder = require_folder(resources.find_folder(path))
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} is not a model folder: it has no config.json")
    config = ModelConfig.load(folder)
    dtype_name = _dtype_name(config.dtype if dtype is None else dtype)
    with OrbaxCheckpoint(folder) if is_orbax(folder) else Checkpoint(folder) as checkpoint:
        tensors = {
            name: info for name, info in checkpoint.tensors.items() if not (text_only and is_vision_tensor(name))
        }
        if config.vision is not None and not has_vision(tensors):
            config = dataclasses.replace(config, vision=None)
        problems = find_problems(tensors, config)
        if problems:
            raise ValueError(f"{folder} does not match its config.json: " + "; ".join(problems))
        has_fp8 = any(info.dtype == FP8_DTYPE for info in tensors.values())
        block = config.quantization.weight_block_size if config.quantization is not None else (128, 128)
        config = dataclasses.replace(config, dtype=dtype_name)
        model = abstract_step3(config)
        flat = parameters_of(model)
        shardings = _list_shardings(flat, layout, shardings)
        places = {path: _place_of(None if shardings is None else shardings[path]) for path in flat}
        obstacle = (
            _find_obstacle(block if has_fp8 else None) if any(place.is_host for place in places.values()) else None
        )
        all_places = sorted(set(places.values()))
        choices = {
            place: choose_form(
                quantization,
                place,
                cpu_obstacle=None if obstacle is None else obstacle.reason,
                has_fp8=has_fp8,
                products=_find_products(place, obstacle, _held_dtype(place, all_places, dtype_name)),
            )
            for place in all_places
        }
        readers = {
            place: TensorReader(
                checkpoint, _held_dtype(place, choices, dtype_name), block, one.quantization, one.keeps_bfloat16
            )
            for place, one in choices.items()
        }
        keeps_fp8 = any(
            one.quantization == "fp8" or (has_fp8 and one.quantization == "stored") for one in choices.values()
        )
        model.config = dataclasses.replace(
            config, quantization=(config.quantization or QuantConfig()) if keeps_fp8 else None
        )
        if layout is not None:
            fit_parallel(layout.parallel, config.text, fp8_block=block if keeps_fp8 else None)
        reason = "; ".join(dict.fromkeys(one.reason for one in choices.values()))
        _check_memory(flat, places, readers, shardings, load_format=load_format, reason=reason, vision=config.vision)
        _log_form(folder, reason, is_slow=quantization != "none" and obstacle is not None and not obstacle.is_wanted)
        if arrangement is None:
            arrangement = _choose_arrangement(places, dtype_name)
        _fill(model, places, readers, shardings, load_format=load_format, stacks=arrangement.stacks, progress=progress)
        return arrange(model, arrangement)


def has_vision(names: Iterable[str]) -> bool:
    """Whether a checkpoint with tensors of these names has a vision tower, or a part of one."""
    return any(is_vision_tensor(name) and not name.endswith(IGNORED_SUFFIXES) for name in names)


def find_problems(tensors: Mapping[str, TensorInfo], config: ModelConfig) -> list[str]:
    """What keeps `tensors` from being the model of `config`, in short; an empty list if nothing does."""
    found = find_differences(tensors, config)
    problems = [summarise(title, items) for title, items in found.items()]
    if config.quantization is None and any(info.dtype == FP8_DTYPE for info in tensors.values()):
        problems.append("config.json has no quantization_config, although there are FP8 tensors")
    return problems


def find_differences(tensors: Mapping[str, TensorInfo], config: ModelConfig) -> dict[str, list[str]]:
    """Every tensor that is missing, extra, or of the wrong shape or dtype, sorted, with a title for each kind.

    FP8 is decided by each tensor's own dtype, not by a rule: a checkpoint may quantise only some of the linear weights.
    """
    expected = expected_tensors(config)
    block = config.quantization.weight_block_size if config.quantization is not None else (128, 128)
    shapes = dict(expected)
    wrong_dtype = []
    for name in expected.keys() & tensors.keys():
        found = tensors[name].dtype
        if found == FP8_DTYPE and is_fp8_tensor(name):
            shapes[scale_name(name)] = scale_shape(expected[name], block)
        elif found not in PLAIN_DTYPES:
            wrong_dtype.append(f"{name} is {found}, {' or '.join(PLAIN_DTYPES)} needed")
    missing = [name for name in shapes if name not in tensors]
    extra = [name for name in tensors if name not in shapes and not name.endswith(IGNORED_SUFFIXES)]
    wrong_shape = []
    for name in shapes.keys() & tensors.keys():
        if tensors[name].shape != shapes[name]:
            wrong_shape.append(f"{name} is {list(tensors[name].shape)}, {list(shapes[name])} needed")
        if name.endswith(SCALE_SUFFIX) and tensors[name].dtype not in SCALE_DTYPES:
            wrong_dtype.append(f"{name} is {tensors[name].dtype}, {' or '.join(SCALE_DTYPES)} needed")
    groups = {
        "tensors missing": missing,
        "tensors it should not have (only FP8 tensors have scales)": extra,
        "tensors of the wrong shape": wrong_shape,
        "tensors of the wrong dtype": wrong_dtype,
    }
    return {title: sorted(items) for title, items in groups.items() if items}


def _list_shardings(
    flat: Mapping[Path, nnx.Param], layout: Layout | None, shardings: Mapping[Path, NamedSharding] | None
) -> Mapping[Path, NamedSharding] | None:
    """Where each parameter goes; None for the default device."""
    if layout is not None:
        return {path: layout.parameter(path) for path in flat}
    if shardings is not None and flat.keys() - shardings.keys():
        lacking = sorted(released_name(path) for path in flat.keys() - shardings.keys())
        raise ValueError("shardings lacks " + summarise("parameters", lacking))
    return shardings


def _place_of(sharding: NamedSharding | None) -> Place:
    if sharding is None:
        return Place(next(iter(jnp.empty(0).devices())).platform, 1)
    return Place(sharding.mesh.devices.flat[0].platform, sharding.mesh.size)


def _log_form(folder: pathlib.Path, reason: str, *, is_slow: bool) -> None:
    """Says how weights are held; as a warning if the CPU kernels would serve, and neither form nor machine lets them."""
    if is_slow:
        _LOGGER.warning(
            "%s: weights %s; with the kernels they take less memory and time (--quantization none asks for this way)",
            folder,
            reason,
        )
    else:
        _LOGGER.info("%s: weights %s", folder, reason)


def _find_obstacle(fp8_block: tuple[int, int] | None) -> Unavailable | None:
    """Why the CPU kernels cannot multiply a checkpoint's weights, with FP8 scales of this block size; None if they can."""
    if fp8_block is not None and fp8_block not in FP8_BLOCKS:
        return Unavailable(f"they take FP8 in blocks of {FP8_BLOCKS[0]}, not of {fp8_block}")
    kernels = find_kernels()
    return kernels if isinstance(kernels, Unavailable) else None


def _find_products(place: Place, obstacle: Unavailable | None, dtype: np.dtype) -> str:
    """The dtype that the CPU kernels multiply in, for activations of `dtype`."""
    found = find_kernels() if place.is_host and obstacle is None else None
    return found.for_activations(dtype).activations if isinstance(found, Kernels) else "float32"


def _held_dtype(place: Place, places: Iterable[Place], dtype: str) -> np.dtype:
    """The dtype of weights without a quantised form; next to a GPU, a CPU computes in float32."""
    is_beside = place.platform == "cpu" and any(other.platform != "cpu" for other in places)
    return np.dtype("float32" if is_beside else dtype)


def _choose_arrangement(places: Mapping[Path, Place], dtype: str) -> Arrangement:
    """How layers are arranged by default, for parameters that are held in these places."""
    ffn, others = (next(place.platform for path, place in places.items() if is_ffn(path) is it) for it in (True, False))
    return Arrangement.of(others, dtype, ffn_platform=ffn)


def _fill(
    model: Step3,
    places: Mapping[Path, Place],
    readers: Mapping[Place, TensorReader],
    shardings: Mapping[Path, NamedSharding] | None,
    *,
    load_format: str,
    stacks: bool,
    progress: bool,
) -> None:
    """Reads every parameter; random weights are never allocated. Layers for accelerators go straight into stacks."""
    flat, vision = parameters_of(model), model.config.vision
    tensors = next(iter(readers.values())).checkpoint.tensors
    bar = tqdm(
        total=sum(tensors[released_name(path)].num_bytes for path in flat),
        desc="loading",
        unit="B",
        unit_scale=True,
        disable=not progress,
    )
    pool = concurrent.futures.ThreadPoolExecutor(NUM_READERS)
    try:
        with bar:
            filler = None
            if stacks and not any(place.is_host for place in readers):
                filler = StackFiller(model, lambda path: readers[places[path]].is_kept(released_name(path)))

            def load(path: Path) -> Array | BlockScaled | None:
                sharding = None if shardings is None else shardings[path]
                value = _load_parameter(readers[places[path]], path, sharding, vision)
                return value if filler is None else filler.put(path, value)

            # Parameters that only other processes hold are not read.
            here = {path for path in flat if places[path].is_host and _is_held_here(shardings, path)}
            jobs = {pool.submit(load, path): path for path in flat if path not in here}
            for place, reader in readers.items():
                if place.is_host:
                    loader = HostLoader(reader, MappedFiles() if load_format == "mmap" else None, vision)
                    own = {path: flat[path] for path in flat if path in here and places[path] == place}
                    loader.fill(own, shardings, pool, bar)
                    _LOGGER.info("%s", loader.report)
            for job in concurrent.futures.as_completed(jobs):
                path = jobs[job]
                if (value := job.result()) is not None:
                    flat[path].set_value(value)
                bar.update(tensors[released_name(path)].num_bytes)
            if filler is not None:
                filler.finish()
    finally:
        pool.shutdown(cancel_futures=True)


def _is_held_here(shardings: Mapping[Path, NamedSharding] | None, path: Path) -> bool:
    """Whether this process's devices hold a part of a parameter."""
    return shardings is None or bool(shardings[path].addressable_devices)


def _check_memory(
    flat: Iterable[Path],
    places: Mapping[Path, Place],
    readers: Mapping[Place, TensorReader],
    shardings: Mapping[Path, NamedSharding] | None,
    *,
    load_format: str,
    reason: str,
    vision: VisionConfig | None,
) -> None:
    """Refuses weights that do not fit in this machine's memory, where they go there: the system would kill the process."""
    needed = 0
    for path in flat:
        place, name = places[path], released_name(path)
        if place.platform != "cpu":
            continue
        reader = readers[place]
        if place.is_host and _is_held_here(shardings, path):
            needed += _host_bytes(reader, name, load_format)
        elif shardings is not None:
            needed += _shard_bytes(reader, name, path, shardings[path], vision)
    left = available_bytes()
    if left is not None and needed > left:
        folder = next(iter(readers.values())).checkpoint.folder
        raise ValueError(
            f"{folder}: its weights take {format_bytes(needed)} of memory ({reason}), but {format_bytes(left)} are left "
            "here: a smaller quantization or load_format mmap needs less; else use a machine or devices with more, or a "
            "smaller checkpoint"
        )


def _host_bytes(reader: TensorReader, name: str, load_format: str) -> int:
    """Memory of this machine that an unsharded parameter takes; 0 where it stays in its file."""
    if load_format != "mmap" or not reader.is_unchanged(name):
        return reader.held_bytes(name)
    is_kept, places = reader.is_kept(name), reader.checkpoint.places
    return sum(
        places[part].num_bytes
        for part in ((name, scale_name(name)) if is_kept else (name,))
        if find_obstacle(places[part], reader.kept_dtype(part) if is_kept else reader.plain_dtype(part))
    )


def _shard_bytes(
    reader: TensorReader, name: str, path: Path, sharding: NamedSharding, vision: VisionConfig | None
) -> int:
    """Memory of this machine that a parameter takes on emulated devices."""
    is_kept, shape = reader.is_kept(name), reader.checkpoint.tensors[name].shape
    itemsize = (reader.kept_dtype(name) if is_kept else reader.dtype).itemsize
    padded = padded_shape(view_shape(shape, path, len(sharding.spec), vision), sharding)
    found = math.prod(sharding.shard_shape(padded)) * itemsize * len(sharding.addressable_devices)
    # Scales are small: count them in full.
    return found + (4 * math.prod(reader.checkpoint.tensors[scale_name(name)].shape) if is_kept else 0)


def _load_parameter(
    reader: TensorReader, path: Path, sharding: NamedSharding | None, vision: VisionConfig | None
) -> Array | BlockScaled:
    name = released_name(path)
    if not reader.is_kept(name):
        num_axes = len(sharding.spec) if sharding is not None else 0
        view = view_shape(reader.checkpoint.tensors[name].shape, path, num_axes, vision)
        return _place(reader, name, reader.dtype, sharding, view)
    values = _place(reader, name, None, sharding)
    scales = _place(reader, scale_name(name), reader.kept_dtype(scale_name(name)), sharding)
    return BlockScaled(values, scales, reader.block)


def _place(
    reader: TensorReader,
    name: str,
    dtype: np.dtype | None,
    sharding: NamedSharding | None,
    view: tuple[int, ...] | None = None,
) -> Shaped[Array, "..."]:
    """Puts a tensor on its devices, part by part; `dtype` None keeps the stored dtype, `view` None its own shape."""
    info = reader.checkpoint.tensors[name]
    read = (
        functools.partial(reader.stored, name)
        if dtype is None
        else functools.partial(reader.converted, name, dtype=dtype)
    )
    if sharding is not None:
        stored = DTYPES[info.dtype] if dtype is None else dtype
        if view is not None and view != info.shape:
            read = functools.partial(read_view, read, info.shape, view)
        array = _place_parts(read, view or info.shape, sharding, stored, is_scale=name.endswith(SCALE_SUFFIX))
    elif len(info.shape) == 3:
        array = jnp.zeros(info.shape, DTYPES[info.dtype] if dtype is None else dtype)
        for expert in range(info.shape[0]):
            array = _set_slice(array, read((expert, slice(None), slice(None))), expert)
    else:
        array = jax.device_put(read((slice(None),) * len(info.shape)))
    # Waiting here bounds the host memory that transfers hold.
    return array.block_until_ready()


def _place_parts(
    read: Callable[[tuple[slice | int, ...]], Shaped[np.ndarray, "..."]],
    shape: tuple[int, ...],
    sharding: NamedSharding,
    dtype: np.dtype,
    *,
    is_scale: bool,
) -> Shaped[Array, "..."]:
    """Each device of this process gets only its own part, and a part that several of them hold is read once."""
    if is_scale:
        sharding, padded = _fit(sharding, shape), shape
    else:
        padded = padded_shape(shape, sharding)
    if not sharding.addressable_devices:
        # `make_array_from_callback` would request all of a replicated array from every device.
        return jax.make_array_from_single_device_arrays(padded, sharding, [], dtype=dtype)
    parts: dict[tuple[tuple[int, int, int], ...], Shaped[np.ndarray, "..."]] = {}

    def read_part(index: tuple[slice, ...] | None) -> Shaped[np.ndarray, "..."]:
        key = tuple(part.indices(size) for part, size in zip(index or (), padded, strict=True))
        if key not in parts:
            # Everything after the last row is padding.
            bounds = zip(key, shape, strict=True)
            bounded = tuple(slice(min(start, size), min(stop, size)) for (start, stop, _), size in bounds)
            is_filling = any(part.start == part.stop for part in bounded)
            found = np.zeros([part.stop - part.start for part in bounded], dtype) if is_filling else read(bounded)
            missing = [(0, stop - start - size) for (start, stop, _), size in zip(key, found.shape, strict=True)]
            parts[key] = np.pad(found, missing) if any(after for _, after in missing) else found
        return parts[key]

    return jax.make_array_from_callback(padded, sharding, read_part)


@functools.partial(jax.jit, donate_argnums=0)
def _set_slice(
    stack: Shaped[Array, "E rows columns"], part: Shaped[Array, "rows columns"], index: Int[Array, ""]
) -> Shaped[Array, "E rows columns"]:
    return jax.lax.dynamic_update_index_in_dim(stack, part, index, 0)


def _fit(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """`sharding`, or a full copy on each device for scales that are too few to be sharded so."""
    try:
        sharding.shard_shape(shape)
    except ValueError:
        return NamedSharding(sharding.mesh, PartitionSpec())
    return sharding


def _dtype_name(dtype: jax.typing.DTypeLike) -> str:
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in MODEL_DTYPES:
        raise ValueError(f"dtype is {name!r}; allowed: {', '.join(MODEL_DTYPES)}")
    return name
