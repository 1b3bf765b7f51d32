"""A process with eight CPU devices, which answers the tests' questions one by one."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import pytest

from tests.process import Ask, environment, worker

PROGRAMS = pathlib.Path(__file__).resolve().parent / "programs"


@pytest.fixture(scope="session")
def eight() -> Iterator[Ask]:
    """Asks the process; an exception there is one here."""
    with worker(PROGRAMS / "worker.py", "8", env=environment()) as ask:
        yield ask
