"""The golden models, loaded once in float32, and their golden arrays."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

from step3_jax.checkpoint.load import load_model
from step3_jax.cpu_kernels.loader import Kernels, find_kernels
from step3_jax.model.cpu import prepare_for_cpu

FOLDERS = ("tiny_text", "tiny_vl", "tiny_fp8")
STORED = "tiny_fp8 as stored"


@pytest.fixture(scope="session")
def models(goldens):
    """Folder name -> model; the FP8 one is dequantised, as its golden numbers were made.

    `STORED` is the FP8 model as stored, on the CPU kernels, if there are any.
    """
    found = {name: load_model(goldens / name, dtype="float32", quantization="none") for name in FOLDERS}
    kernels = find_kernels()
    if isinstance(kernels, Kernels):
        found[STORED] = prepare_for_cpu(
            load_model(goldens / "tiny_fp8", dtype="float32", quantization="stored"), kernels
        )
    return found


@pytest.fixture(scope="session")
def arrays(goldens):
    """Folder name -> golden arrays."""
    found = {name: dict(np.load(goldens / name / "golden.npz")) for name in FOLDERS}
    return found | {STORED: found["tiny_fp8"]}


@pytest.fixture(scope="session")
def run_jitted():
    """Runs a function of a model and arrays as one compiled call: compiling operation by operation is far slower."""

    def run(function, model, *arrays):
        graphdef, state = nnx.split(model)
        return jax.jit(lambda state, *arrays: function(nnx.merge(graphdef, state), *arrays))(state, *arrays)

    return run
