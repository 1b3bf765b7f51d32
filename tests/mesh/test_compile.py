"""The whole sharded step of the real model, compiled for 8 and 32 H100s without one: kernels, exchanges, bytes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.mesh.conftest import PROGRAMS
from tests.process import OPTIMISED, ROOT, environment
from tools import gpu_compile

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(gpu_compile.missing() is not None, reason=str(gpu_compile.missing())),
]
KERNEL = 'custom_call_target="mosaic_gpu_v2"'


def compile_step(num_devices: int, num_layers: int) -> dict[str, object]:
    """What tests/mesh/programs/compile_step.py prints, in a separate process where shapes are not checked."""
    command = [sys.executable, str(PROGRAMS / "compile_step.py"), str(num_devices), str(num_layers)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(**OPTIMISED), capture_output=True, text=True, check=False, timeout=1800
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("num_devices", [8, 32])
def test_the_sharded_step_compiles_with_kernels_and_copies_neither_weights_nor_cache(num_devices: int) -> None:
    found = compile_step(num_devices, num_layers=2)
    for name in ("decode", "prefill"):
        program = found[name]
        assert program["alias"] >= found["pages"], "the cache is not written in place"
        # The experts of a layer are 660 MB on each of 8 devices, the cache of both layers 270 MB.
        assert program["temp"] < 400e6, name
        assert program["count"][KERNEL] >= 6, name
        # A chunk of prompts needs only the cache of the last layer.
        assert program["count"]["reduce-scatter("] >= (2 if name == "prefill" else 4), name
    # What comes with a call is small compared with weights and cache. For 2,048 sequences the room for biases is 17 MB.
    assert found["weights"] + found["pages"] <= found["decode"]["argument"] < found["weights"] + found["pages"] + 20e6
    # A sum after attention and MLP of both layers of the tower, and one in the projector.
    count = found["encode"]["count"]
    assert count["all-reduce("] + count["all-reduce-start("] == 5
    assert count[KERNEL] == 2
    # Where tokens go only to their experts, there is a fallback for steps in which they do not fit.
    assert (found["decode"]["count"]["conditional("] > 0) == (num_devices == 32)


@pytest.mark.parametrize(("num_devices", "weights_gb"), [(8, 42.5), (32, 14.8)])
def test_a_device_has_the_bytes_that_were_reckoned_by_hand(num_devices: int, weights_gb: float) -> None:
    """All 61 layers, from shapes alone."""
    assert compile_step(num_devices, num_layers=61)["weights"] == pytest.approx(weights_gb * 1e9, rel=0.02)
