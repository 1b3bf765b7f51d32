"""A process with six CPU devices, which answers the tests' questions one after the other."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import pytest

from tests.process import Ask, environment, worker

PROGRAMS = pathlib.Path(__file__).resolve().parent / "programs"


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """Asks the process; an exception there is one here."""
    # The programs of one test are those of the next one too.
    kept = environment(
        JAX_COMPILATION_CACHE_DIR=str(tmp_path_factory.mktemp("xla")),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1",
    )
    errors = "ValueError", "TimeoutError"
    with worker(PROGRAMS / "host_worker.py", "6", env=kept, errors=errors) as ask:
        yield ask
