"""The launcher's line to the keeper of one host: a pipe to a local process, or ssh to a remote one.

Both ends exchange JSON after a mark, one message per line. Anything a login shell prints (a message of the day) has no
mark, and is passed on as text.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import os
import pathlib
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO, TypedDict

from step3_jax.launch.watch import Report

_MARK = b"\x1estep3 "
# Text from a host that is kept for an error message.
_MAX_NOISE = 20


class Start(TypedDict):
    """A process to start. `environment` is added to the host's; `has_input` says whether it will get any input."""

    rank: int
    module: str
    words: list[str]
    environment: dict[str, str]
    has_input: bool


class Message(TypedDict, total=False):
    """One line. `kind` says which of the fields are present.

    To the keeper: listen (port, host), reach (host, port, seconds), release, start (processes), signal (rank, signal),
    input (rank, data; none for its end), end (signal, seconds), beat, leave. From it: hello (host, address, gpus,
    versions), listening (port), reached (text: what is wrong, or empty), output (rank, stream, data), reports (reports:
    rank, and the fields of a `watch.Report`), ended (rank, code), failed (text), beat. The launcher's own side adds noise
    (text, which came without a mark) and closed (code).
    """

    kind: str
    rank: int
    code: int
    port: int
    host: str
    address: str
    seconds: float
    signal: int
    stream: str
    data: str
    text: str
    gpus: list[str]
    versions: dict[str, str]
    processes: list[Start]
    reports: list[tuple[int, Report]]


def encode(message: Message) -> bytes:
    """One message as a line."""
    return _MARK + json.dumps(message).encode() + b"\n"


def decode(line: bytes) -> Message:
    """Reads a line; one without a message is noise."""
    _, mark, text = line.partition(_MARK)
    if mark:
        try:
            message = json.loads(text)
        except ValueError:
            message = None
        if isinstance(message, Mapping) and "kind" in message:
            return Message(**message)
    return Message(kind="noise", text=line.decode(errors="replace").rstrip("\r\n"))


def pack_output(rank: int, stream: str, data: bytes) -> Message:
    """Bytes that a process wrote; `stream` is "stdout", "stderr" or "native" (see `log.py`)."""
    return Message(kind="output", rank=rank, stream=stream, data=base64.b85encode(data).decode())


def pack_input(rank: int, data: bytes) -> Message:
    """Bytes for the standard input of a process; none for its end."""
    return Message(kind="input", rank=rank, data=base64.b85encode(data).decode())


def unpack_bytes(message: Message) -> bytes:
    """The bytes of an output or input."""
    return base64.b85decode(message["data"])


@dataclasses.dataclass(frozen=True)
class Event:
    """An event from a host. `connection` is None for a local event, such as a signal."""

    connection: Connection | None
    message: Message


class Connection:
    """One host. Everything it sends goes to the inbox, ending with `closed`."""

    def __init__(self, host: str, command: Sequence[str], inbox: queue.SimpleQueue[Event]) -> None:
        """Starts the keeper.

        Args:
          host: Name to display.
          command: Starts the keeper, here or there.
          inbox: Receives the events.

        Raises:
          ValueError: If the command is not on this machine.
        """
        self.host = host
        self.heard_at = time.monotonic()
        self.noise: list[str] = []
        self.is_closed = False
        self._inbox = inbox
        self._lock = threading.Lock()
        try:
            # Its own session: Ctrl-C is for the launcher, which ends everything in order.
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=_own_environment(),
                start_new_session=True,
            )
        except FileNotFoundError:
            raise ValueError(f"{command[0]} is not on this machine, so {host} cannot be reached") from None
        self._noise_reader = threading.Thread(target=self._read_noise, args=(self._process.stderr,), daemon=True)
        self._noise_reader.start()
        threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True).start()

    def send(self, message: Message) -> None:
        """Sends a message. If that is no longer possible it is dropped: `closed` is then on its way."""
        pipe = self._process.stdin
        with self._lock, contextlib.suppress(OSError, ValueError):
            if pipe is not None:
                pipe.write(encode(message))
                pipe.flush()

    def close(self) -> None:
        """Leaves: the keeper ends anything still running and exits."""
        self.send(Message(kind="leave"))
        with self._lock, contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()

    def wait(self, timeout_s: float) -> bool:
        """Waits for the keeper (or ssh) to end; False if it did not."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        """Closes the line itself. The far end notices, or misses the beats."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def last_noise(self) -> str:
        """The last text from outside the protocol, in one line."""
        return " / ".join(line for line in self.noise[-3:] if line.strip())

    def _read(self, pipe: IO[bytes]) -> None:
        with pipe:
            for line in pipe:
                self.heard_at = time.monotonic()
                message = decode(line)
                if message["kind"] == "noise":
                    self._note(message["text"])
                self._inbox.put(Event(self, message))
        self._noise_reader.join(1)
        code = self._process.wait()
        self.is_closed = True
        self._inbox.put(Event(self, Message(kind="closed", code=code)))

    def _read_noise(self, pipe: IO[bytes]) -> None:
        with pipe:
            for line in pipe:
                text = line.decode(errors="replace").rstrip("\r\n")
                self._note(text)
                self._inbox.put(Event(self, Message(kind="noise", text=text)))

    def _note(self, text: str) -> None:
        self.noise = [*self.noise, text][-_MAX_NOISE:]


def _own_environment() -> dict[str, str]:
    """This environment, extended so that this package can be imported: it may run from an uninstalled checkout."""
    root = pathlib.Path(__file__).resolve().parents[2]
    environment = dict(os.environ)
    if root.name not in ("site-packages", "dist-packages"):
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), environment.get("PYTHONPATH")]))
    return environment
