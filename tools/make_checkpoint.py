"""Makes a random-weight checkpoint in the released layout with any number of layers: full size without the weights.

    python -m tools.make_checkpoint DST --sparse                       # 61 layers, 642 GB that take no disk space
    python -m tools.make_checkpoint DST --preset step3-fp8 --sparse    # 328 GB
    python -m tools.make_checkpoint DST --layers 5 --text-only         # random values, 4 dense layers and a mixture
    python -m tools.make_checkpoint DST --preset step3-fp8 --text-only --layers 3 --dense 1    # 15 GB, two of them mixtures

Names, shapes, dtypes, shards and index are those of the release. With `--sparse` the headers are real and the data are
holes, which read as zeros. Otherwise values are drawn piece by piece, and memory stays below a few hundred MB. A
tensor's values follow from the seed and its name alone, not from the shards.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import pathlib
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence

import ml_dtypes
import numpy as np
from jaxtyping import Shaped
from tqdm import tqdm

from step3_jax.checkpoint.names import expected_tensors, is_fp8_tensor, scale_name
from step3_jax.checkpoint.safetensors_io import LazyArray, num_bytes
from step3_jax.checkpoint.shards import write_checkpoint, write_text
from step3_jax.config import PRESETS, ModelConfig
from step3_jax.layout.tensor import scale_shape

SHARD_BYTES = 5 * 10**9
PIECE_ELEMENTS = 2**22
# Makes `count` elements for a weight of a shape.
Draw = Callable[[np.random.Generator, int, tuple[int, ...]], Shaped[np.ndarray, " count"]]
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)

# Every FP8 code but the two NaNs, so that random bytes become weights.
_FP8_CODES = np.arange(256, dtype=np.uint8)
_FP8_CODES[[0x7F, 0xFF]] = 0x7E, 0xFE
_FP8_RMS = float(np.sqrt(np.mean(np.square(_FP8_CODES.view(FP8).astype(np.float64)))))


def make_checkpoint(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    *,
    sparse: bool = False,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = False,
) -> int:
    """Writes `config.json` and weights under a temporary name, then renames the folder.

    Args:
      folder: Where to write; must not exist, or be empty.
      config: The model; with `quantization` the linear weights of the decoder are FP8 with scales.
      sparse: Whether to write only headers and leave the data as holes.
      seed: Seed of the values.
      shard_bytes: Most bytes of tensors per file; a larger tensor has its own file.
      progress: Whether to show a progress bar.

    Returns:
      Bytes of all tensors.

    Raises:
      ValueError: If `folder` is in the way, `shard_bytes` or `seed` is invalid, or the disk is too small.
    """
    folder = pathlib.Path(folder)
    if seed < 0:
        raise ValueError(f"seed is {seed}; 0 or more is needed")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is in the way: give a folder that does not exist or is empty")
    folder.parent.mkdir(parents=True, exist_ok=True)
    tensors = list_tensors(config, seed=None if sparse else seed)
    total = sum(num_bytes(array) for _, array in tensors)
    free = shutil.disk_usage(folder.parent).free
    if not sparse and total > free:
        raise ValueError(
            f"{folder} needs {total / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free: give fewer layers, or --sparse"
        )
    new = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    new.mkdir()
    try:
        with tqdm(total=total, desc="writing", unit="B", unit_scale=True, disable=not progress) as bar:
            write_text(new / "config.json", json.dumps(config.to_dict(), indent=2) + "\n")
            write_checkpoint(new, [(name, _watch(array, bar)) for name, array in tensors], max_shard_bytes=shard_bytes)
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return total


def list_tensors(config: ModelConfig, *, seed: int | None) -> list[tuple[str, LazyArray]]:
    """Every tensor of the release in file order, each FP8 tensor followed by its scales; zeros without a `seed`."""
    dtype = np.dtype(np.float32 if config.dtype == "float32" else ml_dtypes.bfloat16)
    tensors: list[tuple[str, LazyArray]] = []
    for name, shape in expected_tensors(config).items():
        if config.quantization is None or not is_fp8_tensor(name):
            tensors.append((name, _tensor(name, shape, dtype, seed)))
            continue
        scales = scale_shape(shape, config.quantization.weight_block_size)
        tensors.append((name, _tensor(name, shape, FP8, seed)))
        scale = LazyArray(scales, np.dtype(np.float32), _pieces(_draw_scales, scale_name(name), scales, shape, seed))
        tensors.append((scale_name(name), scale))
    return tensors


def cut_layers(config: ModelConfig, num_layers: int, num_dense: int | None = None) -> ModelConfig:
    """The model with its first `num_layers` layers; layers beyond those of the release are mixtures.

    Args:
      config: The whole model.
      num_layers: Layers to keep, or to have.
      num_dense: How many of the first layers are dense, all others being mixtures; None leaves each as it was.

    Raises:
      ValueError: If `num_layers` is not positive, or above what a configuration may have, or `num_dense` is above it.
    """
    if num_dense is not None and not 0 <= num_dense <= num_layers:
        raise ValueError(f"{num_dense} of {num_layers} layers cannot be dense")
    old = config.text.num_hidden_layers
    kept = tuple(layer for layer in config.text.moe_layers if layer < num_layers)
    mixtures = kept + tuple(range(old, num_layers)) if num_dense is None else tuple(range(num_dense, num_layers))
    text = dataclasses.replace(config.text, num_hidden_layers=num_layers, moe_layers=mixtures)
    return dataclasses.replace(config, text=text)


def _tensor(name: str, shape: tuple[int, ...], dtype: np.dtype, seed: int | None) -> LazyArray:
    middle = 1 if len(shape) == 1 and not name.endswith("bias") else 0
    draw = _draw_fp8 if dtype == FP8 else functools.partial(_draw, middle=middle, dtype=dtype)
    return LazyArray(shape, dtype, _pieces(draw, name, shape, shape, seed))


def _pieces(
    draw: Draw, name: str, shape: tuple[int, ...], weight_shape: tuple[int, ...], seed: int | None
) -> Callable[[], Iterator[Shaped[np.ndarray, " count"]]] | None:
    """Where a `LazyArray` gets its pieces."""
    if seed is None:
        return None
    return functools.partial(_draw_pieces, draw, name, math.prod(shape), weight_shape, seed)


def _draw_pieces(
    draw: Draw, name: str, size: int, weight_shape: tuple[int, ...], seed: int
) -> Iterator[Shaped[np.ndarray, " count"]]:
    random = np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))
    for start in range(0, size, PIECE_ELEMENTS):
        yield draw(random, min(PIECE_ELEMENTS, size - start), weight_shape)


def _draw(
    random: np.random.Generator, count: int, shape: tuple[int, ...], *, middle: int, dtype: np.dtype
) -> Shaped[np.ndarray, " count"]:
    """Uniform values, which take a third of the time of normal ones; their variance is 1 / inputs for a matrix."""
    values = random.random(count, dtype=np.float32)
    values -= 0.5
    values *= 0.1 if len(shape) == 1 else math.sqrt(12 / _num_inputs(shape))
    values += middle
    return values.astype(dtype, copy=False)


def _draw_fp8(random: np.random.Generator, count: int, shape: tuple[int, ...]) -> Shaped[np.ndarray, " count"]:
    return _FP8_CODES[np.frombuffer(random.bytes(count), np.uint8)].view(FP8)


def _draw_scales(random: np.random.Generator, count: int, shape: tuple[int, ...]) -> Shaped[np.ndarray, " count"]:
    scales = random.random(count, dtype=np.float32)
    scales += 0.5
    scales *= 1 / (_FP8_RMS * math.sqrt(_num_inputs(shape)))
    return scales


def _num_inputs(shape: tuple[int, ...]) -> int:
    """Inputs of a linear weight, a stack of them, or a convolution."""
    return math.prod(shape[-1:] if len(shape) == 3 else shape[1:])


def _watch(array: LazyArray, bar: tqdm) -> LazyArray:
    if array.pieces is None:
        return array
    return dataclasses.replace(array, pieces=functools.partial(_watched, array.pieces, bar))


def _watched(
    pieces: Callable[[], Iterator[Shaped[np.ndarray, " count"]]], bar: tqdm
) -> Iterator[Shaped[np.ndarray, " count"]]:
    for piece in pieces():
        yield piece
        bar.update(piece.nbytes)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="make_checkpoint", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("dst", metavar="DST", help="folder to write")
    parser.add_argument("--preset", choices=PRESETS, default="step3", help="sizes and dtypes (default: %(default)s)")
    parser.add_argument("--layers", type=int, metavar="N", help="the first N layers of the decoder (default: all)")
    parser.add_argument(
        "--dense", type=int, metavar="N", help="with --layers: the first N are dense, the others mixtures"
    )
    parser.add_argument("--text-only", action="store_true", help="without vision tower and projector")
    parser.add_argument("--sparse", action="store_true", help="write headers only, with holes for the data")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the values (default: 0)")
    parser.add_argument(
        "--shard-bytes", type=int, default=SHARD_BYTES, metavar="N", help="largest file (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    try:
        config = ModelConfig.preset(arguments.preset)
        if arguments.text_only:
            config = dataclasses.replace(config, vision=None)
        if arguments.layers is not None:
            config = cut_layers(config, arguments.layers, arguments.dense)
        elif arguments.dense is not None:
            raise ValueError("--dense needs --layers, the number of layers that it divides")
        total = make_checkpoint(
            arguments.dst,
            config,
            sparse=arguments.sparse,
            seed=arguments.seed,
            shard_bytes=arguments.shard_bytes,
            progress=sys.stderr.isatty(),
        )
    except (ValueError, OSError) as error:
        print(f"make_checkpoint: error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.dst}: {total:,} bytes of tensors{' (sparse)' if arguments.sparse else ''}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
