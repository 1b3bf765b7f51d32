"""A process with six CPU devices, which answers the tests' questions one by one."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import pytest

from tests.process import Ask, environment, worker

PROGRAMS = pathlib.Path(__file__).resolve().parent / "programs"


@pytest.fixture(scope="session")
def host() -> Iterator[Ask]:
    """Asks the process; an exception there is raised here."""
    errors = "ValueError", "TimeoutError"
    with worker(PROGRAMS / "host_worker.py", "6", env=environment(), errors=errors) as ask:
        yield ask
