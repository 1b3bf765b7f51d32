"""One rank on its own host: started in a session of its own, read to the end, ended by process id."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import IO

from step3_jax.launch.protocol import Message, Start, pack_output

_CHUNK_BYTES = 2**15
# Time for the last output after a process ended; only something that fled its session can hold the pipe longer.
_LAST_OUTPUT_S = 2.0


class RankProcess:
    """A running rank. Its output and its end are sent as messages."""

    def __init__(self, start: Start, send: Callable[[Message], None]) -> None:
        """Starts it.

        Args:
          start: What to run.
          send: Takes messages; called from other threads, and may block.

        Raises:
          OSError: If it cannot be started.
        """
        self.rank = start["rank"]
        self._send = send
        self._lock = threading.Lock()
        self._is_reaped = False
        self._is_over = False
        # Output is shown as it comes, whether or not a terminal is at its end.
        environment = os.environ | {"PYTHONUNBUFFERED": "1"} | start["environment"]
        program = [sys.executable, "-m", "step3_jax.launch.child", str(os.getpid()), start["module"]]
        self._process = subprocess.Popen(
            [*program, *start["words"]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        self._pumps = [
            threading.Thread(target=self._pump, args=(pipe, name), daemon=True)
            for pipe, name in ((self._process.stdout, "stdout"), (self._process.stderr, "stderr"))
        ]
        for thread in [*self._pumps, threading.Thread(target=self._wait, daemon=True)]:
            thread.start()

    @property
    def is_over(self) -> bool:
        """Whether it has ended and everything about it was sent."""
        return self._is_over

    def send_signal(self, number: int) -> None:
        """Signals the process and all that it started; nothing if it is over."""
        with self._lock:
            if not self._is_reaped:
                # Its session has its id. A zombie that nobody may signal is as good as gone.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._process.pid, number)

    def _pump(self, pipe: IO[bytes], stream: str) -> None:
        with pipe:
            while data := os.read(pipe.fileno(), _CHUNK_BYTES):
                self._send(pack_output(self.rank, stream, data))

    def _wait(self) -> None:
        if hasattr(os, "waitid"):
            # Not reaped yet, so that its id still names its group, and nobody else's, when the rest is killed.
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
