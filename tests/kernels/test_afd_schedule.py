"""AFD's decode loops compiled for H100s without one: a tick's work lies between start and end of its exchange."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.process import OPTIMISED, ROOT, environment
from tools import gpu_compile
from tools.afd_schedule import read_ticks

pytestmark = pytest.mark.kernels

PROGRAM = """
%body.1 (arg: (f32[2])) -> (f32[2]) {
  %p = (f32[2]) parameter(0)
  %f = f32[2] fusion(%p), kind=kLoop, calls=%x, metadata={op_name="a/layers.4-59/b"}
  %collective-permute-start.1 = (u8[8], u8[8]) collective-permute-start(%f), channel_id=1
  %k = f32[2] custom-call(%f), custom_call_target="mosaic_gpu_v2"
  %g = f32[2] get-tuple-element(%k), index=0
  %collective-permute-done.1 = u8[8] collective-permute-done(%collective-permute-start.1)
  ROOT %k2 = f32[2] custom-call(%g), custom_call_target="mosaic_gpu_v2"
}

ENTRY %main (p: f32[2]) -> f32[2] {
  %collective-permute-start.2 = (u8[8], u8[8]) collective-permute-start(%p), channel_id=2
  %collective-permute-done.2 = u8[8] collective-permute-done(%collective-permute-start.2)
}
"""


def test_what_is_launched_beside_an_exchange_is_told_from_what_is_not() -> None:
    (tick,) = read_ticks(PROGRAM)
    (at_once,) = read_ticks(PROGRAM.replace("-start.1", ".1").replace("-start(%f)", "(%f)").replace("-done(", "-copy("))
    assert (at_once.kernels_beside, at_once.kernels) == (0, 2)
    assert tick.scope == "layers.4-59"
    assert (tick.kernels_beside, tick.kernels) == (1, 2)
    assert (tick.launches_beside, tick.launches) == (1, 3)


@pytest.mark.skipif(gpu_compile.missing() is not None, reason=str(gpu_compile.missing()))
@pytest.mark.parametrize(
    ("spec", "count", "role"),
    [
        ("1a1f", "3", "attention"),
        ("1a1f", "4", "attention"),
        ("1a1f", "4", "ffn"),
        ("2a2f", "3", "attention"),
        ("2a2f", "4", "ffn"),
    ],
)
def test_the_kernels_of_a_tick_run_beside_its_exchange(spec: str, count: str, role: str) -> None:
    # In a separate process, where shapes are not checked.
    done = subprocess.run(
        [sys.executable, "-m", "tools.afd_schedule", "--case", spec, count, role, "--layers", "4"],
        cwd=ROOT,
        env=environment(**OPTIMISED),
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["lower_s"] > 0
    assert found["compile_s"] > 0
    ticks = found["ticks"]
    assert len(ticks) >= 3
    for tick in ticks:
        assert tick["kernels_beside"] == tick["kernels"] > 0, tick
