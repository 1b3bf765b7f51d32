"""The keeper of one host: starts the ranks on its machine, forwards their output, and never leaves one behind.

    python -m step3_jax.launch.keeper [--deadline SECONDS] [--grace SECONDS]

Runs next to the ranks, here or at the other end of ssh, and talks to the launcher over standard input and output
(`line.py`). When the launcher goes away (end of input), is silent for the deadline (a cut cable gives no end of
input), or the keeper itself is told to stop, the ranks get SIGTERM and after the grace period SIGKILL.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import IO

from step3_jax import __version__
from step3_jax.beacon import BeaconFile
from step3_jax.launch import net
from step3_jax.launch.line import Message, Start, decode, encode, pack_output, unpack_bytes
from step3_jax.launch.log import NATIVE
from step3_jax.launch.watch import Report
from step3_jax.rank import BEACON

_CHUNK_BYTES = 2**15
# Time for the last output after a process ended; only a process that left its session can hold the pipe longer.
_LAST_OUTPUT_S = 2.0
_GPU_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
# Messages that wait to be sent; ranks that write faster than the launcher reads are blocked.
_MAX_WAITING = 1000
_LAST_WORDS_S = 2.0
# How often the clock is checked while ranks are being ended.
_STEP_S = 0.1
# How often the launcher is told where the ranks are.
_REPORT_S = 0.5
# A shell's exit code for a command that it cannot start.
_NOT_STARTED_CODE = 127


class RankProcess:
    """A running rank. Its output and its end are sent as messages."""

    def __init__(self, start: Start, send: Callable[[Message], None]) -> None:
        """Starts it.

        Args:
          start: The process to start.
          send: Takes messages; called from other threads, and may block.

        Raises:
          OSError: If it cannot be started.
        """
        self.rank = start["rank"]
        self._send = send
        self._lock = threading.Lock()
        self._is_reaped = False
        self._is_over = False
        self._beats, self._still_s = -1, 0.0
        # Output is shown as it arrives, whether or not it goes to a terminal.
        environment = os.environ | {"PYTHONUNBUFFERED": "1"} | start["environment"]
        reading, native = os.pipe()
        # Without a name, so that nothing is left behind.
        with tempfile.TemporaryFile() as file, os.fdopen(native, "wb"):
            self._beacon = BeaconFile(file)
            program = [sys.executable, "-m", "step3_jax.launch.child", str(os.getpid()), str(native), start["module"]]
            self._process = subprocess.Popen(
                [*program, *start["words"]],
                stdin=subprocess.PIPE if start["has_input"] else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment | {BEACON: f"/dev/fd/{file.fileno()}"},
                pass_fds=(native, file.fileno()),
                start_new_session=True,
            )
        pipes = {"stdout": self._process.stdout, "stderr": self._process.stderr, NATIVE: os.fdopen(reading, "rb")}
        self._pumps = [
            threading.Thread(target=self._pump, args=(pipe, name), daemon=True) for name, pipe in pipes.items()
        ]
        self._input: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        others = [threading.Thread(target=call, daemon=True) for call in (self._wait, self._feed)]
        for thread in [*self._pumps, *others]:
            thread.start()

    @property
    def is_over(self) -> bool:
        """Whether it has ended and everything about it has been sent."""
        return self._is_over

    def report(self, elapsed_s: float) -> Report:
        """Where it is, and how long it has made no progress; `elapsed_s` have passed since the last report."""
        reading = self._beacon.read()
        self._still_s = 0.0 if reading.beats != self._beats else self._still_s + elapsed_s
        self._beats = reading.beats
        is_inside = bool(reading.place)
        return Report(
            str(reading), reading.changes, is_inside, reading.is_repeated, reading.call, round(self._still_s, 1)
        )

    def give_input(self, data: bytes) -> None:
        """Passes on data from the launcher's standard input; empty at its end."""
        self._input.put(data)

    def send_signal(self, number: int) -> None:
        """Signals the process and everything it started; does nothing if it has ended."""
        with self._lock:
            if not self._is_reaped:
                # Its session has its id. A zombie that cannot be signalled counts as gone.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._process.pid, number)

    def _feed(self) -> None:
        pipe = self._process.stdin
        if pipe is None:
            return
        # A rank that has stopped reading, or has ended, does not need the rest.
        with contextlib.suppress(OSError), pipe:
            while data := self._input.get():
                pipe.write(data)
                pipe.flush()

    def _pump(self, pipe: IO[bytes], stream: str) -> None:
        with pipe:
            while data := os.read(pipe.fileno(), _CHUNK_BYTES):
                self._send(pack_output(self.rank, stream, data))

    def _wait(self) -> None:
        if hasattr(os, "waitid"):
            # Not reaped yet, so that its id still names its own group when the rest is killed.
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
            self.send_signal(signal.SIGKILL)
        else:
            self._process.wait()
        for thread in self._pumps:
            thread.join(_LAST_OUTPUT_S)
        with self._lock:
            code = self._process.wait()
            self._is_reaped = True
        self._send(Message(kind="ended", rank=self.rank, code=code))
        self._is_over = True


class Keeper:
    """Runs until the launcher leaves, and then until the last rank has ended."""

    def __init__(self, *, deadline_s: float, grace_s: float) -> None:
        """Starts to listen; `run` does the rest.

        Args:
          deadline_s: Silence of the launcher after which it counts as lost.
          grace_s: Time from SIGTERM to SIGKILL then.
        """
        self._deadline_s = deadline_s
        self._grace_s = grace_s
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._outbox: queue.Queue[Message | None] = queue.Queue(_MAX_WAITING)
        self._ranks: list[RankProcess] = []
        self._listener: socket.socket | None = None
        self._kill_at = float("inf")
        # Sending blocks when the line is stuck, so neither it nor reading may be on the main thread.
        self._writer = threading.Thread(target=self._write, daemon=True)
        self._writer.start()
        threading.Thread(target=self._read, daemon=True).start()

    def run(self) -> int:
        """Serves the launcher. Returns the exit code: 0 if it left as agreed."""
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._stop)
        # The launcher handles Ctrl-C. A handler, since ranks would inherit SIG_IGN.
        signal.signal(signal.SIGINT, _ignore)
        self._outbox.put(_hello())
        heard_at = reported_at = time.monotonic()
        beat_s = min(self._deadline_s / 5, _REPORT_S)
        beat_at = 0.0
        is_leaving, code = False, 0
        while not is_leaving or not all(rank.is_over for rank in self._ranks):
            now = time.monotonic()
            if now >= beat_at:
                # A full outbox needs no beat.
                with contextlib.suppress(queue.Full):
                    self._outbox.put_nowait(self._report(min(now - reported_at, 2 * beat_s)))
                beat_at, reported_at = now + beat_s, now
            if now >= self._kill_at:
                self._signal(signal.SIGKILL)
            try:
                message = self._inbox.get(timeout=_STEP_S if is_leaving or self._kill_at < float("inf") else beat_s)
                heard_at = time.monotonic()
            except queue.Empty:
                is_lost = time.monotonic() - heard_at > self._deadline_s
                message = Message(kind="lost" if is_lost else "beat")
            if message["kind"] in ("leave", "closed", "lost", "stopped"):
                if not is_leaving:
                    code = 0 if message["kind"] == "leave" else 1
                    self._end(signal.SIGTERM, self._grace_s)
                is_leaving = True
            else:
                self._obey(message)
        # The line may be dead: anything that cannot be sent soon is dropped.
        with contextlib.suppress(queue.Full):
            self._outbox.put(None, timeout=_LAST_WORDS_S)
            self._writer.join(_LAST_WORDS_S)
        return code

    def _obey(self, message: Message) -> None:
        kind = message["kind"]
        try:
            if kind == "start":
                self._release()
                for start in message["processes"]:
                    self._start(start)
            elif kind in ("signal", "input"):
                for rank in self._ranks:
                    if rank.rank == message["rank"] and kind == "signal":
                        rank.send_signal(message["signal"])
                    elif rank.rank == message["rank"]:
                        rank.give_input(unpack_bytes(message))
            elif kind == "end":
                self._end(message["signal"], message["seconds"])
            elif kind == "listen":
                self._listener = net.listen(message["port"], message.get("host"))
                self._outbox.put(Message(kind="listening", port=self._listener.getsockname()[1]))
            elif kind == "reach":
                problem = net.reach(message["host"], message["port"], timeout_s=message["seconds"])
                self._outbox.put(Message(kind="reached", text=problem or ""))
            elif kind == "release":
                self._release()
        except (OSError, ValueError) as error:
            self._outbox.put(Message(kind="failed", text=str(error)))

    def _start(self, start: Start) -> None:
        try:
            self._ranks.append(RankProcess(start, self._pass_on))
        except (OSError, ValueError) as error:
            self._outbox.put(pack_output(start["rank"], "stderr", f"cannot be started: {error}\n".encode()))
            self._outbox.put(Message(kind="ended", rank=start["rank"], code=_NOT_STARTED_CODE))

    def _pass_on(self, message: Message) -> None:
        if message["kind"] == "ended":
            # Where all were when it ended.
            self._outbox.put(self._report(0.0))
        self._outbox.put(message)

    def _release(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def _report(self, elapsed_s: float) -> Message:
        """A beat, with the state of the ranks; time in which this process itself was stopped is not counted."""
        running = [rank for rank in self._ranks if not rank.is_over]
        return Message(kind="reports", reports=[(rank.rank, rank.report(elapsed_s)) for rank in running])

    def _end(self, number: int, grace_s: float) -> None:
        self._signal(number)
        self._kill_at = min(self._kill_at, time.monotonic() + grace_s)

    def _signal(self, number: int) -> None:
        for rank in self._ranks:
            rank.send_signal(number)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._inbox.put(Message(kind="stopped"))

    def _read(self) -> None:
        for line in sys.stdin.buffer:
            self._inbox.put(decode(line))
        self._inbox.put(Message(kind="closed"))

    def _write(self) -> None:
        is_open = True
        while (message := self._outbox.get()) is not None:
            data = encode(message)
            while data and is_open:
                try:
                    data = data[os.write(sys.stdout.fileno(), data) :]
                except OSError:
                    is_open = False


def list_gpus() -> list[str]:
    """Ids of the GPUs that JAX could use here, in the form of CUDA_VISIBLE_DEVICES; does not start JAX."""
    if not any(importlib.util.find_spec(name) for name in _GPU_PLUGINS):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1", "NoDevFiles")]
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
        return done.stdout.split()
    except (OSError, subprocess.SubprocessError):
        # Containers often lack the tool; the driver lists a folder for each.
        folder = pathlib.Path("/proc/driver/nvidia/gpus")
        return [str(number) for number, _ in enumerate(folder.iterdir())] if folder.is_dir() else []


def _hello() -> Message:
    versions = {"step3-jax": __version__, "Python": ".".join(platform.python_version_tuple()[:2])}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        versions["jax"] = importlib.metadata.version("jax")
    return Message(
        kind="hello",
        host=socket.gethostname(),
        address=net.own_address(dict(os.environ)) or "",
        gpus=list_gpus(),
        versions=versions,
    )


def _ignore(number: int, frame: FrameType | None) -> None:
    pass


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the keeper of this host."""
    parser = argparse.ArgumentParser(description="Keeps the processes of one host for `step3 launch`.")
    parser.add_argument("--deadline", type=float, default=15.0, metavar="SECONDS")
    parser.add_argument("--grace", type=float, default=5.0, metavar="SECONDS")
    arguments = parser.parse_args(argv)
    return Keeper(deadline_s=arguments.deadline, grace_s=arguments.grace).run()


if __name__ == "__main__":
    code = main()
    # The reading thread may still wait for input, and the interpreter would wait for it at exit.
    os._exit(code)
