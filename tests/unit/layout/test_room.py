"""The package as a whole: what it may import."""

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


@pytest.mark.parametrize(("room", "allowed"), [("step3_jax.layout", []), ("step3_jax.planner", ["jaxtyping", "numpy"])])
def test_a_deployment_is_described_and_planned_without_jax(room: str, allowed: list[str]) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, room],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    # The search counts many batches at once.
    assert ran.stdout.strip() == str(allowed)
