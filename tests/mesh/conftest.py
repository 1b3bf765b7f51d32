"""A process with eight CPU devices, which answers the tests' questions one after the other."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Compiling is most of the time here, and nothing runs long.
QUICK_COMPILE = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
PROGRAMS = pathlib.Path(__file__).resolve().parent / "programs"
# Nothing takes a tenth of it; what hangs fails its test and not the whole run.
HARD_LIMIT_S = 300

Ask = Callable[..., dict[str, object]]


def environment(**more: str) -> dict[str, str]:
    """Of the processes that tests start: CPU alone, nothing of a launcher's."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("STEP3_")}
    return own | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | more


@pytest.fixture(scope="session")
def eight() -> Iterator[Ask]:
    """Asks the process; an exception there is one here."""
    command = [sys.executable, str(PROGRAMS / "worker.py"), "8"]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(**QUICK_COMPILE), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def ask(do: str, **request: object) -> dict[str, object]:
            watch = threading.Timer(HARD_LIMIT_S, process.kill)
            watch.start()
            try:
                print(json.dumps({"do": do} | request), file=stdin, flush=True)
                line = stdout.readline()
            finally:
                watch.cancel()
            assert line, f"the process ended, or was killed after {HARD_LIMIT_S} s, at {do} {request}"
            answer: dict[str, object] = json.loads(line)
            assert "trace" not in answer or answer["error_type"] == "ValueError", answer["trace"]
            return answer

        yield ask
        stdin.close()
