"""The room as a whole: what it may bring with it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.process import ROOT, environment

IMPORT_ALL = """
import importlib, pkgutil, sys
for name in sys.argv[1:]:
    package = importlib.import_module(name)
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
print(sorted({name.partition(".")[0] for name in sys.modules} & {"jax", "jaxlib", "flax", "jaxtyping", "numpy"}))
"""


@pytest.mark.parametrize("rooms", [["step3_jax.layout"], ["step3_jax.layout", "step3_jax.planner"]])
def test_a_deployment_is_described_and_planned_without_jax(rooms: list[str]) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *rooms],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert ran.stdout.strip() == "[]"
