"""Processes that tests start: their environment, the command line, and a worker that answers questions."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Nothing takes a tenth of it; a hang fails its test and not the whole run.
HARD_LIMIT_S = 300
# Variables of processes whose programs are compiled as they are for users; see tests/conftest.py.
OPTIMISED = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""}
_ANSWER_FILE = "TEST_ANSWER_FILE"

Ask = Callable[..., dict[str, object]]


def environment(**more: str) -> dict[str, str]:
    """Environment of the processes that tests start: CPU only, nothing of a launcher's."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("STEP3_")}
    return own | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | more


def step3(*words: str, cwd: pathlib.Path = ROOT, given: str = "", **more: str) -> subprocess.CompletedProcess[str]:
    """Runs the command; `given` is its standard input, `more` its environment."""
    command = [sys.executable, "-m", "step3_jax.cli.main", *words]
    return subprocess.run(
        command, cwd=cwd, env=environment(**more), input=given, capture_output=True, text=True, timeout=240, check=False
    )


@contextlib.contextmanager
def worker(
    program: pathlib.Path, *words: str, env: Mapping[str, str], errors: Sequence[str] = ("ValueError",)
) -> Iterator[Ask]:
    """A process that answers each line of JSON with one. An exception there is an answer if it is one of `errors`."""
    command = [sys.executable, str(program), *words]
    with subprocess.Popen(
        command, cwd=ROOT, env=dict(env), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
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
            assert "trace" not in answer or answer["error_type"] in errors, answer["trace"]
            return answer

        yield ask
        process.kill()


def run_together(program: pathlib.Path, words: Sequence[str], variables: Sequence[Mapping[str, str]]) -> list[object]:
    """What each of several processes passes to `give_answer`. All are killed when one fails, or after a fixed time.

    Args:
      program: The program that each runs.
      words: Arguments for all.
      variables: The whole environment of each process.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [pathlib.Path(folder) / str(rank) for rank in range(len(variables))]
        processes = [
            subprocess.Popen(
                [sys.executable, str(program), *words],
                cwd=ROOT,
                env=dict(own) | {_ANSWER_FILE: str(file)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for own, file in zip(variables, files, strict=True)
        ]

        def kill() -> None:
            for process in processes:
                process.kill()

        watch = threading.Timer(HARD_LIMIT_S, kill)
        watch.start()
        try:
            for process, file in zip(processes, files, strict=True):
                said, _ = process.communicate()
                assert process.returncode == 0, f"exit code {process.returncode}: {said[-3000:]}"
                assert file.exists(), f"no answer: {said[-3000:]}"
            return [json.loads(file.read_text(encoding="utf-8")) for file in files]
        finally:
            watch.cancel()
            kill()
            for process in processes:
                process.wait()


def give_answer(answer: object) -> None:
    """Returns JSON from a process of `run_together`. Not over standard output, to which gloo writes too."""
    pathlib.Path(os.environ[_ANSWER_FILE]).write_text(json.dumps(answer), encoding="utf-8")


def anonymous_kib(pid: int | str = "self") -> int:
    """Memory of a process that belongs to no file, swapped out or not."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return sum(int(value) for value in re.findall(r"^(?:RssAnon|VmSwap):\s+(\d+)", status, re.MULTILINE))


def measure_peak_kib(call: Callable[[], object]) -> int:
    """By how much this process grows at most while `call` runs."""
    # Makes the peak what is resident now.
    pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = _resident_kib("VmRSS")
    call()
    return _resident_kib("VmHWM") - before


def _resident_kib(name: str) -> int:
    status = pathlib.Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition(f"{name}:")[2].split()[0])


def free_port() -> int:
    """An unused port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
