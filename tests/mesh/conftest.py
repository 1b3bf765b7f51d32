"""A process with eight CPU devices, which answers the tests' questions one by one."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import pytest

from tests.process import Ask, environment, worker

PROGRAMS = pathlib.Path(__file__).resolve().parent / "programs"
# Compiling is most of the time here, and nothing runs long.
QUICK_COMPILE = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}


@pytest.fixture(scope="session")
def eight() -> Iterator[Ask]:
    """Asks the process; an exception there is one here."""
    with worker(PROGRAMS / "worker.py", "8", env=environment(**QUICK_COMPILE)) as ask:
        yield ask
