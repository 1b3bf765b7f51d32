"""The launcher as a user starts it: a separate process, its ranks, and where they are."""

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
from collections.abc import Callable, Iterator, Mapping, Sequence

from step3_jax.beacon import Reading, read_beacon
from step3_jax.rank import BEACON, PROCESS_ID
from tests.process import ROOT


@dataclasses.dataclass
class Running:
    """A running launcher.

    Attributes:
      folder: Takes its output, and is its folder for temporary files.
      limit_s: For each wait; nothing takes a third of it.
    """

    process: subprocess.Popen[bytes]
    folder: pathlib.Path
    limit_s: float

    @property
    def stderr(self) -> str:
        return (self.folder / "err").read_text(encoding="utf-8", errors="replace")

    @property
    def stdout(self) -> bytes:
        return (self.folder / "out").read_bytes()

    def wait(self) -> int:
        return self.process.wait(self.limit_s)

    def wait_for(self, pattern: str, count: int = 1) -> list[str]:
        """Waits for text on stderr; the matches."""
        give_up_at = time.monotonic() + self.limit_s
        while len(found := re.findall(pattern, self.stderr)) < count:
            assert self.process.poll() is None, f"ended before {pattern} was seen: {self.stderr}"
            assert time.monotonic() < give_up_at, f"{pattern} never came: {self.stderr}"
            time.sleep(0.02)
        return found

    def pids(self, count: int) -> list[int]:
        """Ids of ranks (and what they started) that reported them."""
        return [int(pid) for pid in self.wait_for(r"\] pid (\d+)", count)]

    def wait_for_rank(self, rank: int, is_there: Callable[[Reading], bool]) -> int:
        """Waits until a rank is at a place; its process id. Linux only."""
        give_up_at = time.monotonic() + self.limit_s
        while (pid := find_rank(self.process.pid, rank, is_there)) is None:
            assert self.process.poll() is None, self.stderr
            assert time.monotonic() < give_up_at, f"never came: {self.stderr}"
            time.sleep(0.01)
        return pid

    def left_files(self) -> set[str]:
        """What is in the folder for temporary files, except logs that messages name."""
        return {path.name for path in (self.folder / "tmp").iterdir() if not path.name.startswith("step3-native-")}


@contextlib.contextmanager
def launching(folder: pathlib.Path, environment: Mapping[str, str], limit_s: float) -> Iterator[Callable[..., Running]]:
    """A function that starts `step3 launch` with options and words; all that it started is killed at the end.

    Args:
      folder: Takes a folder for each.
      environment: Environment of all.
      limit_s: Limit of each wait.
    """
    started: list[Running] = []

    def begin(options: str, words: Sequence[str], **more: str) -> Running:
        own = folder / f"run{len(started)}"
        (own / "tmp").mkdir(parents=True)
        command = [sys.executable, "-m", "step3_jax.cli.main", "launch", *options.split(), "--", *words]
        with (own / "out").open("wb") as stdout, (own / "err").open("wb") as stderr:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env={**environment, "TMPDIR": str(own / "tmp"), **more},
                cwd=ROOT,
                start_new_session=True,
            )
        started.append(Running(process, own, limit_s))
        return started[-1]

    try:
        yield begin
    finally:
        for running in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.process.pid, signal.SIGKILL)
            running.process.wait()


# Where a rank of a command that runs a model is.
AT_PLACE: dict[str, Callable[[Reading], bool]] = {
    "start": lambda reading: reading.process_id > 0,
    "prefill": lambda reading: reading.place == "prefill",
    # The first call compiles.
    "decode": lambda reading: reading.place == "decode" and reading.is_repeated,
}


def find_rank(ancestor: int, rank: int, is_there: Callable[[Reading], bool]) -> int | None:
    """The process of a rank that another one started, if it is at a place. Linux only."""
    for pid in descendants(ancestor):
        with contextlib.suppress(OSError, ValueError):
            if variable(pid, PROCESS_ID) == str(rank) and is_there(
                read_beacon(f"/proc/{pid}/fd/{variable(pid, BEACON).rpartition('/')[2]}")
            ):
                return pid
    return None


def descendants(parent: int) -> list[int]:
    """Ids of all processes that one has started, and of what they started. Linux only."""
    children: dict[int, list[int]] = {}
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            text = path.read_text(encoding="utf-8")
            children.setdefault(int(text.rpartition(")")[2].split()[1]), []).append(int(path.parent.name))
    found, left = [], [parent]
    while left:
        own = children.get(left.pop(), [])
        found += own
        left += own
    return found


def variable(pid: int, name: str) -> str:
    """A variable of the environment that a process was started with; empty if not set. Linux only."""
    entries = pathlib.Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((entry.decode()[len(name) + 1 :] for entry in entries if entry.startswith(f"{name}=".encode())), "")


def is_gone(pid: int) -> bool:
    """Whether a process has ended; a zombie counts as ended."""
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
