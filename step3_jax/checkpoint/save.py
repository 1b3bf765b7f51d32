"""Writes a model in the released layout, so that other tools, and `load_model`, can read it."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import cast

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float, Shaped

from step3_jax.checkpoint.names import (
    expected_tensors,
    is_fp8_tensor,
    our_path,
    parameters_of,
    released_name,
    scale_name,
)
from step3_jax.checkpoint.safetensors_io import LazyArray
from step3_jax.checkpoint.shards import INDEX_FILE, write_checkpoint, write_text
from step3_jax.checkpoint.view import leave_view
from step3_jax.config import DTYPES, ModelConfig, QuantConfig
from step3_jax.layout.table import view_shape
from step3_jax.layout.tensor import scale_shape
from step3_jax.model.arrangement import unstack
from step3_jax.model.step3 import Step3
from step3_jax.quant import FP8, BlockScaled, PackedInt4, quantise
from step3_jax.stack import LayerOf, parts

# The most of a weight that is copied to the host at a time.
BAND_BYTES = 2**26

Value = Shaped[Array, "..."] | BlockScaled | PackedInt4 | LayerOf


def save_model(
    model: Step3,
    folder: str | os.PathLike[str],
    *,
    dtype: jax.typing.DTypeLike | None = None,
    quantise_fp8: bool = False,
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
) -> None:
    """Writes `config.json` and the weights under a temporary name, then renames the folder.

    Weights are copied to the host in bands of at most `BAND_BYTES`, so that little memory is needed besides the model's; the
    parts of joined products are first copied on their device. Weights that are FP8 in the model are written unchanged. The
    padding of a sharded model, all of whose devices must be of this process, is left out.

    Args:
      model: The model.
      folder: Where to write; must not exist, or be empty.
      dtype: "float32" or "bfloat16", for what is not FP8; the dtype of the model's embedding if absent.
      quantise_fp8: Whether the weights that the FP8 release quantises are written as FP8.
      max_shard_bytes: Above this size the weights are split into several files with an index.
      overwrite: Whether to replace an existing model folder: its weights and its config.json are removed, its other
        files (tokenizer, chat template) stay.

    Raises:
      ValueError: If `folder` may not be replaced, for an unknown dtype, or for weights in INT8 or INT4, for which the
        released layout has no form.
    """
    folder = pathlib.Path(folder)
    _check_target(folder, overwrite)
    model = unstack(model)
    flat = {released_name(path): parameter.get_value() for path, parameter in parameters_of(model).items()}
    _check_forms(flat)
    kept = model.text.embed_tokens.weight[...].dtype
    dtype_name = jnp.dtype(kept if dtype is None else dtype).name
    if dtype_name not in DTYPES:
        raise ValueError(f"dtype is {dtype_name!r}; allowed: {', '.join(DTYPES)}")
    config = _saved_config(model.config, flat, dtype_name, quantise_fp8)
    block = config.quantization.weight_block_size if quantise_fp8 and config.quantization is not None else None
    tensors = [
        entry
        for name, shape in expected_tensors(config).items()
        for entry in _entries(
            name,
            flat[name],
            np.dtype(dtype_name),
            block if is_fp8_tensor(name) else None,
            shape,
            view_shape(shape, our_path(name), len(flat[name].shape), config.vision),
        )
    ]
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    new.mkdir()
    try:
        write_text(new / "config.json", json.dumps(config.to_dict(), indent=2) + "\n")
        write_checkpoint(new, tensors, max_shard_bytes=max_shard_bytes)
        _replace(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _check_forms(flat: Mapping[str, Value]) -> None:
    for name, (stored, _) in ((name, parts(value)) for name, value in flat.items()):
        is_packed = isinstance(stored, PackedInt4)
        if is_packed or (isinstance(stored, BlockScaled) and stored.values.dtype != FP8):
            raise ValueError(
                f"{name} is in {'INT4' if is_packed else 'INT8'}, for which the released layout has no form: load the model "
                "with quantization stored, fp8 or none to save it"
            )


def _saved_config(config: ModelConfig, flat: dict[str, Value], dtype: str, quantise_fp8: bool) -> ModelConfig:
    blocks = {stack.block for stack, _ in map(parts, flat.values()) if isinstance(stack, BlockScaled)}
    if len(blocks) > 1:
        raise ValueError(f"the model mixes FP8 blocks of {sorted(blocks)}; config.json can name only one size")
    quantization = None
    if blocks or quantise_fp8:
        quantization = config.quantization or QuantConfig()
        quantization = dataclasses.replace(
            quantization, weight_block_size=next(iter(blocks), quantization.weight_block_size)
        )
    return dataclasses.replace(config, dtype=dtype, quantization=quantization)


def _entries(
    name: str,
    value: Value,
    dtype: np.dtype,
    block: tuple[int, int] | None,
    shape: tuple[int, ...],
    view: tuple[int, ...],
) -> list[tuple[str, LazyArray]]:
    """What is written for one parameter: one tensor, or FP8 values and their scales.

    Args:
      name: Name of the tensor.
      value: The parameter, possibly padded beyond `view`, unless it is or becomes FP8.
      dtype: Dtype of a tensor that is not FP8.
      block: Block of a tensor that is quantised here.
      shape: Shape of the tensor.
      view: The same with the axes of `value`.
    """
    stack, layer = parts(value)
    if isinstance(stack, BlockScaled):
        fields = [field if layer is None else LayerOf(field, layer) for field in (stack.values, stack.scales)]
        return [
            (name, _lazy(fields[0], np.dtype(ml_dtypes.float8_e4m3fn))),
            (scale_name(name), _lazy(fields[1], np.dtype(np.float32))),
        ]
    own = cast(Array | LayerOf, value)
    if block is None and value.shape == shape:
        return [(name, _lazy(own, dtype))]
    if block is None:
        return [(name, LazyArray(shape, dtype, functools.partial(_trim, cast(Array, own), dtype, shape, view)))]
    scales = scale_shape(value.shape, block)
    return [
        (
            name,
            LazyArray(
                value.shape, np.dtype(ml_dtypes.float8_e4m3fn), functools.partial(_quantised, own, block, "values")
            ),
        ),
        # Quantised a second time: cheaper than keeping a layer's scales until they are written.
        (
            scale_name(name),
            LazyArray(scales, np.dtype(np.float32), functools.partial(_quantised, own, block, "scales")),
        ),
    ]


_quantise = jax.jit(quantise, static_argnames=("form", "block"))


def _lazy(array: Shaped[Array, "..."] | LayerOf, dtype: np.dtype) -> LazyArray:
    return LazyArray(array.shape, dtype, functools.partial(_cast, array, dtype))


def _cast(array: Shaped[Array, "..."] | LayerOf, dtype: np.dtype) -> Iterator[Shaped[np.ndarray, "..."]]:
    for band in _bands(array):
        yield np.asarray(band).astype(dtype, copy=False)


def _trim(
    array: Shaped[Array, "..."], dtype: np.dtype, shape: tuple[int, ...], view: tuple[int, ...]
) -> Iterator[Shaped[np.ndarray, "..."]]:
    yield leave_view(np.asarray(array), shape, view).astype(dtype, copy=False)


def _quantised(
    array: Float[Array, "*lead rows columns"] | LayerOf, block: tuple[int, int], field: str
) -> Iterator[Shaped[np.ndarray, "..."]]:
    for band in _bands(array, block[0]):
        yield np.asarray(getattr(_quantise(band, block=block), field))


def _bands(
    array: Shaped[Array, "..."] | LayerOf, multiple: int = 1
) -> Iterator[Shaped[Array, "..."] | Shaped[np.ndarray, "..."]]:
    """An array in bands of about `BAND_BYTES`, in order; all but a matrix's last one have a multiple of `multiple` rows."""
    stack, layer = parts(array)
    whole = cast(Array, stack)
    # numpy slices what is in this machine's memory without a copy; arrays of other devices are sliced there.
    is_here = whole.is_fully_replicated and all(device.platform == "cpu" for device in whole.devices())
    source = np.asarray(whole) if is_here else whole
    first = () if layer is None else (int(layer),)
    shape = whole.shape[len(first) :]
    if len(shape) not in (2, 3):
        yield source[first] if first else source
        return
    row_bytes = max(shape[-1] * whole.dtype.itemsize, 1)
    num_rows = max(BAND_BYTES // row_bytes // multiple, 1) * multiple
    for expert in np.ndindex(shape[:-2]):
        for start in range(0, shape[-2], num_rows):
            yield source[(*first, *expert, slice(start, min(start + num_rows, shape[-2])))]


def _check_target(folder: pathlib.Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder to save to")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{folder} is not empty; give another folder, or overwrite=True to replace the model in it")
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} is not empty and has no config.json, so it is not a model folder to overwrite")


def _replace(new: pathlib.Path, folder: pathlib.Path) -> None:
    """Replaces `folder` with `new`; files that are not part of the model move over."""
    if not folder.exists():
        new.rename(folder)
        return
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    folder.rename(old)
    new.rename(folder)
    for entry in old.iterdir():
        if entry.suffix != ".safetensors" and entry.name not in ("config.json", INDEX_FILE):
            entry.rename(folder / entry.name)
    shutil.rmtree(old)
