"""The launcher as a user starts it: a process of its own, whose ranks are small programs beside these tests."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from step3_jax.launch.cluster import detect_task

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAMS = pathlib.Path(__file__).resolve().parent / "programs"
# Nothing here takes a tenth of it; a launcher that hangs fails its test and not the whole run.
HARD_LIMIT_S = 120


@dataclasses.dataclass
class Running:
    """A launcher that runs."""

    process: subprocess.Popen[bytes]
    stderr_path: pathlib.Path
    stdout_path: pathlib.Path

    @property
    def stderr(self) -> str:
        return self.stderr_path.read_text(encoding="utf-8", errors="replace")

    @property
    def stdout(self) -> bytes:
        return self.stdout_path.read_bytes()

    def wait(self, timeout_s: float = HARD_LIMIT_S) -> int:
        return self.process.wait(timeout_s)

    def wait_for(self, pattern: str, count: int = 1) -> list[str]:
        """Waits for text on stderr; the matches."""
        give_up_at = time.monotonic() + HARD_LIMIT_S
        while len(found := re.findall(pattern, self.stderr)) < count:
            assert self.process.poll() is None, f"ended before {pattern} was seen: {self.stderr}"
            assert time.monotonic() < give_up_at, f"{pattern} never came: {self.stderr}"
            time.sleep(0.02)
        return found

    def pids(self, count: int) -> list[int]:
        """Ids of ranks (and what they started) that said so."""
        return [int(pid) for pid in self.wait_for(r"\] pid (\d+)", count)]


def is_gone(pid: int) -> bool:
    """Whether a process has ended; one that waits for its parent to notice has."""
    if pathlib.Path("/proc/self/stat").exists():
        try:
            return pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] in "ZX"
        except (FileNotFoundError, ProcessLookupError):
            return True
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return done.stdout.strip()[:1] in ("", "Z")


def wait_until_gone(pids: Sequence[int], timeout_s: float = 20) -> None:
    """Fails if one of the processes lives on."""
    give_up_at = time.monotonic() + timeout_s
    while left := [pid for pid in pids if not is_gone(pid)]:
        assert time.monotonic() < give_up_at, f"left behind: {left}"
        time.sleep(0.02)


Start = Callable[..., Running]


@pytest.fixture
def environment() -> dict[str, str]:
    """Of the launcher: the programs can be imported, and no scheduler of the machine that tests is seen."""
    schedulers = ("SLURM_", "OMPI_", "PMIX_", "JOB_COMPLETION_INDEX", "STEP3_", "SSH_")
    found = {name: value for name, value in os.environ.items() if not name.startswith(schedulers)}
    return found | {"PYTHONPATH": f"{ROOT}{os.pathsep}{PROGRAMS}", "JAX_PLATFORMS": "cpu"}


@pytest.fixture
def start(tmp_path: pathlib.Path, environment: dict[str, str]) -> Iterator[Start]:
    """Starts `step3 launch` with options and the words of a program; kills it at the end whatever happened."""
    started: list[Running] = []

    def begin(options: str, words: Sequence[str], *, module: str = "scripted_rank", **extra: str) -> Running:
        out, err = tmp_path / f"out{len(started)}", tmp_path / f"err{len(started)}"
        command = [
            sys.executable,
            "-m",
            "step3_jax.cli.main",
            "launch",
            *options.split(),
            "--module",
            module,
            "--",
            *words,
        ]
        with out.open("wb") as stdout, err.open("wb") as stderr:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env=environment | extra,
                cwd=ROOT,
                start_new_session=True,
            )
        started.append(Running(process, err, out))
        return started[-1]

    yield begin
    for running in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.process.pid, signal.SIGKILL)
        running.process.wait()


@pytest.fixture(autouse=True)
def _no_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' own process is in no job either."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "PMIX_")) or name == "JOB_COMPLETION_INDEX":
            monkeypatch.delenv(name)
    assert detect_task(os.environ, "here") is None
