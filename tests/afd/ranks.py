"""Ranks that tests start one by one, each with its supervisor, and where their workers are."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence

from step3_jax.beacon import Reading, read_beacon
from tests.process import ROOT, environment

PROGRAMS = pathlib.Path(__file__).resolve().parent / "programs"
ROLES = ("attention 0", "ffn 0")


@dataclasses.dataclass
class Rank:
    """A supervisor that runs, and its worker."""

    process: subprocess.Popen[bytes]
    folder: pathlib.Path
    limit_s: int

    @property
    def stdout(self) -> str:
        return (self.folder / "out").read_text(encoding="utf-8")

    @property
    def stderr(self) -> str:
        return (self.folder / "err").read_text(encoding="utf-8")

    def wait(self) -> int:
        """Waits for the supervisor; its exit code."""
        return self.process.wait(self.limit_s)

    def wait_for(self, is_there: Callable[[Reading], bool]) -> int:
        """Waits until the worker is at a place; its process id."""
        give_up_at = time.monotonic() + self.limit_s
        while True:
            assert self.process.poll() is None, self.stderr
            assert time.monotonic() < give_up_at, f"never came: {self.stderr}"
            for path in self.folder.glob("step3-*/beacon"):
                with contextlib.suppress(OSError, ValueError):
                    if is_there(found := read_beacon(path)):
                        return found.process_id
            time.sleep(0.01)

    def message(self) -> str:
        """The one line that says why all ended."""
        [line] = re.findall(r"^step3: error: .*", self.stderr, re.MULTILINE)
        return str(line)


def is_starting(reading: Reading) -> bool:
    return reading.place == "the start"


def is_prefilling(reading: Reading) -> bool:
    return reading.place == "prefill"


def is_decoding(reading: Reading) -> bool:
    return reading.step >= 3


def is_gone(pid: int) -> bool:
    """Whether a process has ended; one that waits for its parent to notice has."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


Start = Callable[..., Rank]


@contextlib.contextmanager
def starting(folder: pathlib.Path, command: Sequence[str], limit_s: int) -> Iterator[Start]:
    """A function that starts one rank of two, by its number, more words and more variables; all are killed at the end.

    Args:
      folder: Takes the ranks' folders.
      command: Its first words.
      limit_s: For each wait.
    """
    port = free_pair()
    started: list[Rank] = []

    def start(rank: int, *words: str, **more: str) -> Rank:
        own = folder / f"rank{rank}-{len(started)}"
        own.mkdir()
        variables = {
            "STEP3_COORDINATOR": f"127.0.0.1:{port}",
            "STEP3_NUM_PROCESSES": "2",
            "STEP3_PROCESS_ID": str(rank),
            "STEP3_START_TIMEOUT": str(limit_s),
            "TMPDIR": str(own),
            "PYTHONPATH": f"{ROOT}{os.pathsep}{PROGRAMS}",
        }
        with (own / "out").open("wb") as stdout, (own / "err").open("wb") as stderr:
            process = subprocess.Popen(
                [*command, *words],
                env=environment(**variables | more),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        started.append(Rank(process, own, limit_s))
        return started[-1]

    try:
        yield start
    finally:
        for rank in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(rank.process.pid, signal.SIGKILL)
            rank.process.wait()


def free_pair() -> int:
    """A port that is free together with the one after it."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first:
            port: int = first.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError), socket.create_server(("127.0.0.1", port + 1)):
                return port
