"""The launcher with ranks that are small programs next to these tests."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Iterator, Sequence

import pytest

from step3_jax.launch.cluster import detect_task
from tests.launched import Running, launching
from tests.process import ROOT

PROGRAMS = pathlib.Path(__file__).resolve().parent / "programs"
# Nothing here takes a tenth of it; a launcher that hangs fails its test and not the whole run.
HARD_LIMIT_S = 120

Start = Callable[..., Running]


@pytest.fixture
def environment() -> dict[str, str]:
    """The launcher's environment: the programs can be imported, and no scheduler of the test machine is seen."""
    schedulers = ("SLURM_", "OMPI_", "PMIX_", "JOB_COMPLETION_INDEX", "STEP3_", "SSH_")
    found = {name: value for name, value in os.environ.items() if not name.startswith(schedulers)}
    return found | {"PYTHONPATH": f"{ROOT}{os.pathsep}{PROGRAMS}", "JAX_PLATFORMS": "cpu"}


@pytest.fixture
def start(tmp_path: pathlib.Path, environment: dict[str, str]) -> Iterator[Start]:
    """Starts `step3 launch` with options and the words of a program; kills it at the end whatever happens."""
    with launching(tmp_path, environment, HARD_LIMIT_S) as begin:

        def begin_module(options: str, words: Sequence[str], *, module: str = "scripted_rank", **extra: str) -> Running:
            return begin(f"{options} --module {module}", words, **extra)

        yield begin_module


@pytest.fixture(autouse=True)
def _no_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' own process is not in a job either."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "PMIX_")) or name == "JOB_COMPLETION_INDEX":
            monkeypatch.delenv(name)
    assert detect_task(os.environ, "here") is None
