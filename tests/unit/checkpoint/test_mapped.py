"""Weights that stay in their file: what is mapped and what is copied, and a file that is cut short."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from step3_jax.checkpoint import load
from step3_jax.checkpoint.convert import convert
from step3_jax.checkpoint.load import load_model
from step3_jax.checkpoint.mapped import CAST, QUANTISED, LoadReport, find_obstacle
from step3_jax.checkpoint.names import parameters_of
from step3_jax.checkpoint.placement import Placement
from step3_jax.checkpoint.plan import plan_conversion
from step3_jax.checkpoint.safetensors_io import write_safetensors
from step3_jax.checkpoint.source import open_source
from step3_jax.cpu_kernels.loader import Unavailable, find_kernels
from tests.process import environment

needs_library = pytest.mark.skipif(
    isinstance(find_kernels(), Unavailable), reason="the library that watches mapped files cannot be had here"
)


@pytest.fixture
def reports(monkeypatch):
    """What happened to the bytes of each load."""
    found = []

    def info(text, *args):
        found.extend(arg for arg in args if isinstance(arg, LoadReport))

    monkeypatch.setattr(load._LOGGER, "info", info)
    return found


def address(array):
    return array.unsafe_buffer_pointer()


@needs_library
def test_what_needs_no_change_is_not_copied(goldens, tmp_path, reports):
    convert(plan_conversion(open_source(goldens / "tiny_fp8"), form="hf"), tmp_path / "model")
    model = load_model(tmp_path / "model", "float32", load_format="mmap")
    copied = load_model(tmp_path / "model", "float32")
    mapped, plain = reports
    total = sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))
    # Norms, convolutions and biases are cast; that is little of a large model.
    assert mapped.mapped_bytes > 0.8 * total
    assert plain.mapped_bytes == 0
    assert mapped.mapped_bytes + sum(mapped.copied_bytes.values()) == sum(plain.copied_bytes.values())
    assert CAST in str(mapped)
    maps = pathlib.Path("/proc/self/maps").read_text()
    inside = [line for line in maps.splitlines() if str(tmp_path / "model") in line]
    ends = [tuple(int(end, 16) for end in line.split()[0].split("-")) for line in inside]
    values = address(model.text.layers[1].ffn.moe.gate_proj.get_value().values)
    assert any(start <= values < end for start, end in ends)
    for path, parameter in parameters_of(model).items():
        other = parameters_of(copied)[path].get_value()
        for one, right in zip(jax.tree.leaves(parameter.get_value()), jax.tree.leaves(other), strict=True):
            assert np.asarray(one).tobytes() == np.asarray(right).tobytes()


@pytest.mark.slow  # It compiles a quantisation of each shape, which test_host.py does too.
@needs_library
def test_nothing_of_what_is_quantised_or_widened_is_mapped(goldens, reports):
    load_model(goldens / "tiny_fp8", "float32", quantization="int8", load_format="mmap")
    assert reports[0].copied_bytes[QUANTISED] > 0
    load_model(goldens / "tiny_fp8", "bfloat16", quantization="none", load_format="mmap")
    # Weights that are bfloat16 in the file and stay so: none of those that are FP8 there.
    assert reports[1].copied_bytes[CAST] > reports[0].copied_bytes[QUANTISED] * 0.99


def test_a_tensor_that_lies_between_is_copied(tmp_path):
    tensors = {"first": np.zeros(3, np.float32), "second": np.zeros(64, np.float32)}
    write_safetensors(tmp_path / "model.safetensors", tensors.items())
    start = (tmp_path / "model.safetensors").stat().st_size - 64 * 4
    for offset, obstacle in ((start, "not at a multiple of 64"), (start - 12, None)):
        found = find_obstacle(Placement("F32", (64,), tmp_path / "model.safetensors", offset), np.dtype(np.float32))
        assert (found or "").startswith(obstacle or "")
        assert (found is None) == (obstacle is None)


CUT_SHORT = """
import sys
import jax, jax.numpy as jnp
from step3_jax.checkpoint.load import load_model

model = load_model(sys.argv[1], "float32", load_format="mmap")
leaves = jax.tree.leaves(model.text.layers[1].ffn.moe.up_proj.get_value())
print("loaded", flush=True)
with open(sys.argv[1] + "/model.safetensors", "r+b") as file:
    file.truncate(4096)
print(jax.jit(lambda leaves: sum(jnp.sum(leaf.astype(jnp.float32)) for leaf in leaves))(leaves))
print("went on")
"""


@needs_library
def test_a_file_that_is_cut_short_is_named_and_ends_the_process(goldens, tmp_path):
    folder = shutil.copytree(goldens / "tiny_fp8", tmp_path / "model")
    convert(plan_conversion(open_source(folder), form="hf"), tmp_path / "aligned")
    command = [sys.executable, "-c", CUT_SHORT, str(tmp_path / "aligned")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment())
    assert done.returncode == 1
    assert done.stdout.split() == ["loaded"]
    assert "step3: error: " in done.stderr
    assert f"{tmp_path}/aligned/model.safetensors was cut short while its weights were in use" in done.stderr


@needs_library
def test_a_truncated_file_is_refused_before_anything_is_mapped(goldens, tmp_path, reports):
    folder = shutil.copytree(goldens / "tiny_fp8", tmp_path / "model")
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) - 1000)
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated"):
        load_model(folder, "float32", load_format="mmap")
    assert not reports
