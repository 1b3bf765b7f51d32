"""Loading a checkpoint: everything is checked first, then tensors go band by band from the disk to their devices.

On the CPU, threads read each band to its place in memory that JAX then takes as it is: a model takes no more memory than
its weights. For accelerators host memory never holds the model. What it holds at a time is, for each of the threads, one
slice (one expert of a stack, one matrix, or a device's part of it) and its copy in the wanted dtype.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Shaped
from tqdm import tqdm

from step3_jax import resources
from step3_jax.checkpoint.buffer import BufferPool, empty_aligned
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
from step3_jax.config import ModelConfig, VisionConfig
from step3_jax.gpu import claim_memory
from step3_jax.layout.parallel import fit_parallel
from step3_jax.layout.table import view_shape
from step3_jax.layout.tensor import Path, scale_shape
from step3_jax.mesh import Layout, find_devices, padded_shape
from step3_jax.model.arrangement import Arrangement, arrange
from step3_jax.model.step3 import Step3, abstract_step3
from step3_jax.quant import BlockScaled
from step3_jax.stored_file import require_folder

NUM_READERS = 4
PLAIN_DTYPES = ("BF16", "F32", "F16", "F64")
# The release has float32; some tools store scales as the other tensors, or as powers of two. All become float32.
SCALE_DTYPES = (*PLAIN_DTYPES, "F8_E8M0")
# Buffers that old tools store though they follow from the configuration.
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
    keep_fp8: bool | None = None,
    shardings: Mapping[Path, NamedSharding] | None = None,
    layout: Layout | None = None,
    arrangement: Arrangement | None = None,
    text_only: bool = False,
    progress: bool = False,
) -> Step3:
    """Loads a model folder in the released layout, or in the Orbax form that `step3 convert` writes.

    Args:
      path: Folder with `config.json` and `model.safetensors`, or shards and their index, or `weights/`. A checkpoint
        without any vision tensor gives a text-only model.
      dtype: "float32" or "bfloat16", of weights and activations; the configuration's if absent.
      keep_fp8: Whether FP8 weights stay FP8 on the device (values and scales as stored), or are dequantised to `dtype`,
        once, here. By default they stay, except on CPU, where nothing is gained.
      shardings: Where each parameter goes, by its path in the model (see `names`); each host then reads only the parts
        its devices hold. One with more axes than the tensor is for its heads, see `layout.table.view_shape`. If absent, all
        goes to the default device.
      layout: The same, from a parallel setting: head and vision tower are filled up with zeros where they do not divide.
      arrangement: How the decoder's layers lie; by default as it is best where the weights go, see `Arrangement.of`.
      text_only: Whether the vision tower and the projector are left on the disk.
      progress: Whether to show a bar with bytes and rate.

    Returns:
      The model; `model.config` tells its dtype, whether it is text-only and whether it is quantised.

    Raises:
      ValueError: If `path` is no model folder, the configuration is wrong, or tensors are missing, superfluous, damaged,
        of the wrong shape or dtype: all of them are listed. Also if the layout does not divide the model.
    """
    claim_memory()
    if shardings is not None and layout is not None:
        raise ValueError("shardings and layout both say where parameters go: give one of them")
    # Says what is missing where JAX_PLATFORMS asks for what is not there.
    find_devices()
    folder = require_folder(resources.find_folder(path))
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} is no model folder: it holds no config.json")
    config = ModelConfig.load(folder)
    dtype_name = _dtype_name(config.dtype if dtype is None else dtype)
    if keep_fp8 is None:
        keep_fp8 = jax.default_backend() != "cpu"
    with OrbaxCheckpoint(folder) if is_orbax(folder) else Checkpoint(folder) as checkpoint:
        tensors = {
            name: info for name, info in checkpoint.tensors.items() if not (text_only and is_vision_tensor(name))
        }
        if config.vision is not None and not has_vision(tensors):
            config = dataclasses.replace(config, vision=None)
        problems = find_problems(tensors, config)
        if problems:
            raise ValueError(f"{folder} does not hold the model of its config.json: " + "; ".join(problems))
        has_fp8 = any(info.dtype == FP8_DTYPE for info in tensors.values())
        block = config.quantization.weight_block_size if config.quantization is not None else (128, 128)
        config = dataclasses.replace(
            config, dtype=dtype_name, quantization=config.quantization if has_fp8 and keep_fp8 else None
        )
        if layout is not None:
            fit_parallel(layout.parallel, config.text, fp8_block=block if config.quantization is not None else None)
        reader = TensorReader(checkpoint, np.dtype(dtype_name), block, keep_fp8)
        return _fill(config, reader, layout.parameter if layout is not None else shardings, arrangement, progress)


def has_vision(names: Iterable[str]) -> bool:
    """Whether a checkpoint with tensors of these names has a vision tower, or a part of one."""
    return any(is_vision_tensor(name) and not name.endswith(IGNORED_SUFFIXES) for name in names)


def find_problems(tensors: Mapping[str, TensorInfo], config: ModelConfig) -> list[str]:
    """What keeps `tensors` from being the model of `config`, in short; an empty list if nothing does."""
    found = find_differences(tensors, config)
    problems = [summarise(title, items) for title, items in found.items()]
    if config.quantization is None and any(info.dtype == FP8_DTYPE for info in tensors.values()):
        problems.append("config.json has no quantization_config, though there are FP8 tensors")
    return problems


def find_differences(tensors: Mapping[str, TensorInfo], config: ModelConfig) -> dict[str, list[str]]:
    """Every tensor that is missing, extra, or of the wrong shape or dtype, sorted, under a title for each kind.

    FP8 goes by each tensor's own dtype, not by a rule: a checkpoint may quantise some of the linear weights only.
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
        "tensors it should not have (scales belong to FP8 tensors alone)": extra,
        "tensors of the wrong shape": wrong_shape,
        "tensors of the wrong dtype": wrong_dtype,
    }
    return {title: sorted(items) for title, items in groups.items() if items}


def _fill(
    config: ModelConfig,
    reader: TensorReader,
    shardings: Mapping[Path, NamedSharding] | Callable[[Path], NamedSharding] | None,
    arrangement: Arrangement | None,
    progress: bool,
) -> Step3:
    """The module with every parameter read; no memory is ever taken for random weights."""
    model = abstract_step3(config)
    flat = parameters_of(model)
    if callable(shardings):
        shardings = {path: shardings(path) for path in flat}
    if shardings is not None and flat.keys() - shardings.keys():
        lacking = sorted(released_name(path) for path in flat.keys() - shardings.keys())
        raise ValueError("shardings lacks " + summarise("parameters", lacking))
    if arrangement is None:
        arrangement = Arrangement.of(_platform(shardings), config.dtype)
    _check_memory(reader, flat, shardings, config.vision)
    bar = tqdm(
        total=sum(reader.checkpoint.tensors[released_name(path)].num_bytes for path in flat),
        desc="loading",
        unit="B",
        unit_scale=True,
        disable=not progress,
    )
    pool = concurrent.futures.ThreadPoolExecutor(NUM_READERS)
    try:
        with bar:
            if shardings is None and _is_host():
                _fill_host(flat, reader, pool, bar)
                return arrange(model, arrangement)
            filler = StackFiller(model, lambda path: _is_quantised(reader, path)) if arrangement.stacks else None

            def load(path: Path) -> Array | BlockScaled | None:
                sharding = None if shardings is None else shardings[path]
                value = _load_parameter(reader, path, sharding, config.vision)
                return value if filler is None else filler.put(path, value)

            jobs = {pool.submit(load, path): path for path in flat}
            for job in concurrent.futures.as_completed(jobs):
                path = jobs[job]
                if (value := job.result()) is not None:
                    flat[path].set_value(value)
                bar.update(reader.checkpoint.tensors[released_name(path)].num_bytes)
            if filler is not None:
                filler.finish()
    finally:
        pool.shutdown(cancel_futures=True)
    return arrange(model, arrangement)


def _check_memory(
    reader: TensorReader,
    paths: Iterable[Path],
    shardings: Mapping[Path, NamedSharding] | None,
    vision: VisionConfig | None,
) -> None:
    """Refuses weights that this machine's memory cannot hold, where they go there: it would end the process."""
    if shardings is None and not _is_host():
        return
    needed = 0
    for path in paths:
        name = released_name(path)
        is_kept = reader.keep_fp8 and reader.is_fp8(name)
        for part in (name, scale_name(name)) if is_kept else (name,):
            shape = reader.checkpoint.tensors[part].shape
            itemsize = (reader.kept_dtype(part) if is_kept else reader.dtype).itemsize
            if shardings is None or part != name:
                # Scales are few: they count whole.
                needed += math.prod(shape) * itemsize
                continue
            sharding = shardings[path]
            is_host = sharding.mesh.devices.flat[0].platform == "cpu"
            num_copies = len(sharding.addressable_devices) if is_host else 0
            padded = padded_shape(view_shape(shape, path, len(sharding.spec), vision), sharding)
            needed += math.prod(sharding.shard_shape(padded)) * itemsize * num_copies
    left = available_bytes()
    if left is not None and needed > left:
        advice = "dtype bfloat16 halves it; else " if reader.dtype == np.float32 else ""
        raise ValueError(
            f"{reader.checkpoint.folder}: its weights take {format_bytes(needed)} of memory in {reader.dtype}, and "
            f"{format_bytes(left)} are left here; {advice}take a machine or devices with more, or a smaller checkpoint"
        )


def _is_quantised(reader: TensorReader, path: Path) -> bool:
    """Whether a parameter is loaded as values and scales."""
    return reader.keep_fp8 and reader.is_fp8(released_name(path))


def _platform(shardings: Mapping[Path, NamedSharding] | None) -> str:
    """Of the devices that weights go to."""
    if shardings is None:
        return jax.default_backend()
    return next(iter(shardings.values())).mesh.devices.flat[0].platform


def _is_host() -> bool:
    """Whether arrays go to the CPU if nothing else is said."""
    return next(iter(jnp.empty(0).devices())).platform == "cpu"


def _fill_host(
    flat: Mapping[Path, nnx.Param], reader: TensorReader, pool: concurrent.futures.ThreadPoolExecutor, bar: tqdm
) -> None:
    """Reads every parameter to memory that is JAX's own afterwards, several bands at a time."""
    buffers = BufferPool()
    arrays: dict[str, Shaped[np.ndarray, "..."]] = {}
    jobs: dict[Path, list[concurrent.futures.Future[int]]] = {}
    for path in flat:
        name = released_name(path)
        is_kept = reader.keep_fp8 and reader.is_fp8(name)
        jobs[path] = []
        for part in (name, scale_name(name)) if is_kept else (name,):
            info = reader.checkpoint.tensors[part]
            # The system gives no memory before it is written to.
            array = arrays[part] = empty_aligned(info.shape, reader.kept_dtype(part) if is_kept else reader.dtype)
            jobs[path] += [pool.submit(reader.read_band, part, band, array, buffers) for band in reader.cut(part)]
    for path, parts in jobs.items():
        for job in parts:
            bar.update(job.result())
        name = released_name(path)
        values = jax.device_put(arrays.pop(name))
        scales = arrays.pop(scale_name(name), None)
        flat[path].set_value(values if scales is None else BlockScaled(values, jax.device_put(scales), reader.block))


def _load_parameter(
    reader: TensorReader, path: Path, sharding: NamedSharding | None, vision: VisionConfig | None
) -> Array | BlockScaled:
    name = released_name(path)
    if not (reader.keep_fp8 and reader.is_fp8(name)):
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
    """Puts a tensor on its devices, part by part; `dtype` None leaves it as stored, `view` None in its own shape."""
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
    # Waiting here is what bounds the host memory that transfers hold on to.
    return array.block_until_ready()


def _place_parts(
    read: Callable[[tuple[slice | int, ...]], Shaped[np.ndarray, "..."]],
    shape: tuple[int, ...],
    sharding: NamedSharding,
    dtype: np.dtype,
    *,
    is_scale: bool,
) -> Shaped[Array, "..."]:
    """Every device of this process asks for its part alone, and what several of them hold is read once."""
    if is_scale:
        sharding, padded = _fit(sharding, shape), shape
    else:
        padded = padded_shape(shape, sharding)
    if not sharding.addressable_devices:
        # `make_array_from_callback` would ask for all of an array that every device has a copy of.
        return jax.make_array_from_single_device_arrays(padded, sharding, [], dtype=dtype)
    parts: dict[tuple[tuple[int, int, int], ...], Shaped[np.ndarray, "..."]] = {}

    def read_part(index: tuple[slice, ...] | None) -> Shaped[np.ndarray, "..."]:
        key = tuple(part.indices(size) for part, size in zip(index or (), padded, strict=True))
        if key not in parts:
            # What lies behind the last row is filling.
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
    """`sharding`, or a full copy on each device for scales that are too few to be divided so."""
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
