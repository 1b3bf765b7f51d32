"""What a worker writes to stderr: lines pass at once, but for those that native code writes when a peer is gone.

These (stacks of C++, the words of gloo, NCCL and JAX's coordination service) wait until it is known why the worker
ended. Nothing is lost: they are shown, or kept in a file.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import select
import tempfile
import threading
import time
from typing import IO

# As they were seen with jaxlib 0.10.2 and 0.11.2 and gloo when a peer was killed or stopped; NCCL's from its source.
_LOST_PEER = re.compile(
    rb"gloo[^ ]* .*(failed|error)|gloo/transport|connection (reset|closed) by|socket closed|stream removed"
    rb"|coordination[_ ]?service|JAX distributed service|heartbeat"
    rb"|nccl.*(remote|system|unhandled) *(process|error|cuda)|ncclRemoteError|ncclCommAbort",
    re.IGNORECASE,
)
_STACK = re.compile(
    rb"[EF]\d{4} \d\d:\d\d:\d\d|\*\*\* |terminate called|Fatal Python error|Traceback \(most recent call last\)"
)
_READ_BYTES = 2**16
# How often an unfinished line, such as a question or an answer that grows, is passed on.
_PAUSE_S = 0.1
# A stack without a word of a peer, after which the worker lives on, concerns the user.
_STACK_S = 3.0
_MAX_HELD_BYTES = 2**22


class NoiseFilter:
    """Reads a worker's stderr in a thread of its own, so that a slow reader of ours does not hold up the supervisor."""

    def __init__(self, pipe: IO[bytes], out: int, *, hold_s: float) -> None:
        """Begins to read.

        Args:
          pipe: The worker's stderr.
          out: Descriptor that lines are written to.
          hold_s: How long words about a lost peer wait for their explanation while the worker lives.
        """
        self.last_line = ""
        self.has_lost_peer = False
        self._pipe = pipe
        self._out = out
        self._hold_s = hold_s
        self._rest = b""
        self._held: list[bytes] = []
        self._release_at = float("inf")
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="stderr", daemon=True)
        self._thread.start()

    def join(self, timeout_s: float) -> None:
        """Waits until the worker's end of the pipe is closed and all was read."""
        self._thread.join(timeout_s)

    def release(self) -> None:
        """Shows what was held back."""
        with self._lock:
            self._release()

    def keep(self, prefix: str) -> pathlib.Path | None:
        """Writes what was held back to a file of its own in the folder for temporary files.

        Args:
          prefix: The name's begin.

        Returns:
          The file; None if nothing was held back or it could not be written (it is shown then).
        """
        with self._lock:
            if not self._held:
                return None
            path: pathlib.Path | None = None
            with contextlib.suppress(OSError):
                handle, name = tempfile.mkstemp(prefix=prefix, suffix=".log")
                with os.fdopen(handle, "wb") as file:
                    file.write(b"".join(self._held))
                self._held.clear()
                path = pathlib.Path(name)
            self._release()
            return path

    def _run(self) -> None:
        with self._pipe:
            handle = self._pipe.fileno()
            while True:
                if select.select([handle], [], [], _PAUSE_S)[0]:
                    data = os.read(handle, _READ_BYTES)
                    with self._lock:
                        if not data:
                            self._pass_rest()
                            return
                        *lines, self._rest = (self._rest + data).split(b"\n")
                        for line in lines:
                            self._take(line + b"\n")
                else:
                    with self._lock:
                        if time.monotonic() > self._release_at:
                            self._release()
                            # It has survived it.
                            self.has_lost_peer = False
                        if not self._held:
                            self._pass_rest()

    def _take(self, line: bytes) -> None:
        if text := line.strip():
            self.last_line = text.decode(errors="replace")
        is_lost_peer = _LOST_PEER.search(line) is not None
        if is_lost_peer or _STACK.match(line):
            self.has_lost_peer |= is_lost_peer
            hold_s = self._hold_s if self.has_lost_peer else min(_STACK_S, self._hold_s)
            if not self._held or is_lost_peer:
                self._release_at = time.monotonic() + hold_s
        elif not self._held:
            self._write(line)
            return
        self._held.append(line)
        if sum(map(len, self._held)) > _MAX_HELD_BYTES:
            self._release()

    def _pass_rest(self) -> None:
        if self._rest:
            line, self._rest = self._rest, b""
            self._take(line)

    def _release(self) -> None:
        self._release_at = float("inf")
        for line in self._held:
            self._write(line)
        self._held.clear()

    def _write(self, data: bytes) -> None:
        with contextlib.suppress(OSError):
            while data:
                data = data[os.write(self._out, data) :]
