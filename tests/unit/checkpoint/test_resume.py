"""A killed conversion resumes to the same result, byte for byte, and does nothing twice."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[3]
# Source, form and dtype: copies and changes of dtype, both ways.
CASES = [
    ("tiny_text", "hf", "fp8"),
    ("tiny_fp8", "orbax", None),
    ("tiny_vl", "hf", "bf16"),
    ("tiny_text", "orbax", "fp8"),
    ("tiny_fp8", "hf", "bf16"),
]


def interrupt(source, folder, form, dtype, *extra):
    script = pathlib.Path(__file__).with_name("interrupted.py")
    options = ["--to", form, *(["--dtype", dtype] if dtype else []), *extra]
    done = subprocess.run(
        [sys.executable, str(script), str(source), str(folder), *options],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"
    return json.loads(done.stdout)


@pytest.mark.parametrize(("source", "form", "dtype"), CASES[:2])
def test_killed_at_random_calls(goldens, tmp_path, source, form, dtype):
    said = interrupt(goldens / source, tmp_path, form, dtype, "--kills", "4", "--seed", "1")
    assert said["kills"] >= 4
    assert said["kept_units"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "form", "dtype", "kills"),
    [(*case, kills) for case, kills in zip(CASES, (50, 50, 20, 20, 20), strict=True)],
)
def test_killed_many_times_at_random_calls(goldens, tmp_path, source, form, dtype, kills):
    said = interrupt(goldens / source, tmp_path, form, dtype, "--kills", str(kills), "--seed", "2")
    assert said["kills"] >= kills
    assert said["kept_units"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("source", "form", "dtype"), CASES[:2])
def test_killed_many_times_at_random_moments(goldens, tmp_path, source, form, dtype):
    said = interrupt(goldens / source, tmp_path, form, dtype, "--kills", "20", "--seed", "3", "--timed")
    assert said["kills"] >= 20
