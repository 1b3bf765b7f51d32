"""The launcher's line to the keeper of one host: a pipe to a process here, or ssh to one elsewhere."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO

from step3_jax.launch import address
from step3_jax.launch.protocol import Message, decode, encode

# No question that nobody can answer, no wait of minutes for a host that is off.
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-T")
_KEEPER = "step3_jax.launch.keeper"
# Text of a host that is kept for a message about it.
_MAX_NOISE = 20


@dataclasses.dataclass(frozen=True)
class Event:
    """What came from a host. `connection` is None for what arose here, such as a signal."""

    connection: Connection | None
    message: Message


class Connection:
    """One host. Everything that comes from it goes to the inbox, at last a `closed`."""

    def __init__(self, host: str, command: Sequence[str], inbox: queue.SimpleQueue[Event]) -> None:
        """Starts the keeper.

        Args:
          host: Name to show.
          command: Starts the keeper, here or there.
          inbox: Takes the events.

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
            # A session of its own: Ctrl-C is for the launcher, which ends all in order.
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
        """Sends a message. What can no longer be sent is dropped: `closed` is then on its way."""
        pipe = self._process.stdin
        with self._lock, contextlib.suppress(OSError, ValueError):
            if pipe is not None:
                pipe.write(encode(message))
                pipe.flush()

    def close(self) -> None:
        """Leaves: the keeper ends what still runs and goes."""
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
        """Ends the line itself. The far end notices, or misses the beats."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def last_noise(self) -> str:
        """The last text that came outside the protocol, in one line."""
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


def keeper_command(
    host: str,
    *,
    deadline_s: float,
    grace_s: float,
    ssh: Sequence[str] = SSH,
    python: str | None = None,
    directory: str | None = None,
) -> list[str]:
    """The command that starts the keeper of a host.

    Args:
      host: A name for ssh; "localhost" and its addresses need none.
      deadline_s: Silence of the launcher after which the keeper ends its ranks.
      grace_s: From SIGTERM to SIGKILL then.
      ssh: ssh with its options.
      python: The interpreter there; this one's path if absent.
      directory: Where it runs there; the same as here if absent.
    """
    options = ["-m", _KEEPER, "--deadline", f"{deadline_s:g}", "--grace", f"{grace_s:g}"]
    if address.is_this_machine(host):
        return [sys.executable, *options]
    there = shlex.join(["cd", directory or str(pathlib.Path.cwd())])
    return [*ssh, host, f"{there} && exec {shlex.join([python or sys.executable, *options])}"]


def _own_environment() -> dict[str, str]:
    """This environment, in which this package can be imported: it may run from a checkout that is not installed."""
    root = pathlib.Path(__file__).resolve().parents[2]
    environment = dict(os.environ)
    if root.name not in ("site-packages", "dist-packages"):
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), environment.get("PYTHONPATH")]))
    return environment
