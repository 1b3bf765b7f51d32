"""Reading bands into their places in an array: the same values as the whole tensor, whatever the form and dtype."""

from __future__ import annotations

import shutil

import ml_dtypes
import numpy as np
import pytest

from step3_jax.checkpoint import reader
from step3_jax.checkpoint.buffer import BufferPool
from step3_jax.checkpoint.convert import convert
from step3_jax.checkpoint.orbax_io import OrbaxCheckpoint
from step3_jax.checkpoint.plan import plan_conversion
from step3_jax.checkpoint.reader import TensorReader
from step3_jax.checkpoint.safetensors_io import DTYPES
from step3_jax.checkpoint.shards import Checkpoint
from step3_jax.checkpoint.source import open_source
from step3_jax.config import ModelConfig


@pytest.fixture(params=["hf", "orbax"])
def folder(request, goldens, tmp_path):
    """The golden FP8 model in both forms."""
    if request.param == "hf":
        return shutil.copytree(goldens / "tiny_fp8", tmp_path / "model")
    convert(plan_conversion(open_source(goldens / "tiny_fp8"), form="orbax"), tmp_path / "model")
    return tmp_path / "model"


def open_folder(folder):
    return OrbaxCheckpoint(folder) if (folder / "weights").exists() else Checkpoint(folder)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("quantization", ["stored", "none"])
def test_bands_make_the_whole_tensor(folder, dtype, quantization, monkeypatch):
    monkeypatch.setattr(reader, "BAND_BYTES", 5000)
    monkeypatch.setattr(reader, "PART_BYTES", 700)
    block = ModelConfig.load(folder).quantization.weight_block_size
    with open_folder(folder) as checkpoint:
        tensors = TensorReader(checkpoint, np.dtype(dtype), block, quantization)
        num_cut = 0
        for name, info in checkpoint.tensors.items():
            everything = tuple(slice(0, length) for length in info.shape)
            if quantization == "stored" and tensors.is_fp8(name):
                expected = tensors.stored(name, everything)
            else:
                expected = tensors.converted(name, everything)
            whole = np.zeros(info.shape, expected.dtype)
            bands = tensors.cut(name)
            num_cut += len(bands) > 1
            read = sum(tensors.read_band(name, band, whole, BufferPool()) for band in bands)
            assert read == info.num_bytes == whole.size * DTYPES[info.dtype].itemsize
            assert whole.tobytes() == expected.tobytes(), name
        assert num_cut > 10


def test_a_file_that_goes_away_is_named(folder):
    with open_folder(folder) as checkpoint:
        tensors = TensorReader(checkpoint, np.dtype(np.float32), (128, 128), "none")
        name = "model.embed_tokens.weight"
        shape = checkpoint.tensors[name].shape
        shutil.rmtree(folder)
        with pytest.raises(ValueError, match=r"(safetensors|/0\.0) cannot be read: No such file"):
            tensors.read_band(name, tensors.cut(name)[0], np.zeros(shape, np.float32), BufferPool())
