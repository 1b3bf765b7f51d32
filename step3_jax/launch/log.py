"""The ranks' output: rank 0's standard output unchanged, the rest line by line on stderr, prefixed with its rank.

The output of native code (C++ of XLA, gloo, NCCL) is separate from Python's, and is shown a little later: when a rank
is lost, the others write pages of consequences, which go to a file.
"""

from __future__ import annotations

import collections
import os
import pathlib
import tempfile
import time
from typing import BinaryIO, NamedTuple, TextIO

# Lines of a rank that are kept for the message about its failure.
_TAIL_LINES = 20
# An unfinished line is shown when it is this long.
_MAX_LINE_BYTES = 2**16
NATIVE = "native"
# How long native code's lines are held back: longer than it takes to learn of a rank's end, and to judge it.
HOLD_S = 3.0
_MAX_HELD_LINES = 2000


class _Held(NamedTuple):
    rank: int
    host: str
    text: str
    came_at: float


class Log:
    """Shows the output of all ranks."""

    def __init__(self, stdout: BinaryIO, stderr: TextIO) -> None:
        """Starts with nothing shown.

        Args:
          stdout: Receives rank 0's standard output, byte by byte.
          stderr: Receives everything else.
        """
        self._stdout = stdout
        self._stderr = stderr
        self._parts: dict[tuple[int, str], bytes] = {}
        self._tails: dict[int, collections.deque[str]] = {}
        self._is_interrupted = False
        self._held: collections.deque[_Held] = collections.deque(maxlen=_MAX_HELD_LINES)
        self._is_judged = False
        self._blamed: int | None = None

    def interrupt(self) -> None:
        """Shows only rank 0 from now on: what the others write about peers that are being ended is useless."""
        self._is_interrupted = True

    def blame(self, rank: int | None) -> None:
        """Called when everything ends because of a rank: shows its native output, and no longer the others'."""
        self._is_judged, self._blamed = True, rank
        own = [held for held in self._held if held.rank == rank]
        self._held = collections.deque((held for held in self._held if held.rank != rank), _MAX_HELD_LINES)
        for held in own:
            self._print(held.rank, held.host, held.text)

    def show_native(self, *, hold_s: float = HOLD_S) -> None:
        """Shows native output that was held back long enough, unless everything is ending because of a rank."""
        if self._is_judged:
            return
        before = time.monotonic() - hold_s
        while self._held and self._held[0].came_at <= before:
            held = self._held.popleft()
            self._print(held.rank, held.host, held.text)

    def keep_native(self) -> pathlib.Path | None:
        """Writes the others' native output up to then to a file, in the folder for temporary files.

        Returns:
          The file; None if there was nothing, or it could not be written.
        """
        if not self._held:
            return None
        try:
            handle, name = tempfile.mkstemp(prefix="step3-native-", suffix=".log")
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.writelines(f"[{held.rank} {held.host}] {held.text}\n" for held in self._held)
        except OSError:
            return None
        return pathlib.Path(name)

    def push(self, rank: int, host: str, stream: str, data: bytes) -> None:
        """Shows bytes that a rank wrote to "stdout" or "stderr"; holds back those from native code ("native").

        Raises:
          BrokenPipeError: If the reader of our standard output has left.
        """
        if rank == 0 and stream == "stdout":
            self._stdout.write(data)
            self._stdout.flush()
        data = self._parts.pop((rank, stream), b"") + data
        *lines, rest = data.split(b"\n")
        if len(rest) > _MAX_LINE_BYTES:
            lines, rest = [*lines, rest], b""
        if rest:
            self._parts[rank, stream] = rest
        for line in lines:
            self._show(rank, host, stream, line)

    def finish(self, rank: int, host: str) -> None:
        """Shows a rank's last, unterminated line; it will write no more."""
        for stream in ("stdout", "stderr", NATIVE):
            if rest := self._parts.pop((rank, stream), b""):
                self._show(rank, host, stream, rest)

    def note(self, text: str) -> None:
        """Writes one of the launcher's own lines."""
        print(f"step3 launch: {text}", file=self._stderr, flush=True)

    def note_host(self, host: str, text: str) -> None:
        """Writes a line that a host itself printed, such as one from ssh."""
        print(f"[{host}] {text}", file=self._stderr, flush=True)

    def tail(self, rank: int) -> list[str]:
        """The last lines of a rank, from both its streams."""
        return list(self._tails.get(rank, ()))

    def _show(self, rank: int, host: str, stream: str, line: bytes) -> None:
        # A progress bar overwrites its states: the last one is what a reader would see.
        text = line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace")
        self._tails.setdefault(rank, collections.deque(maxlen=_TAIL_LINES)).append(text)
        if stream == NATIVE and not self._is_judged:
            self._held.append(_Held(rank, host, text, time.monotonic()))
        elif stream == NATIVE:
            # The others are being ended, and say so.
            if rank == self._blamed:
                self._print(rank, host, text)
        elif stream != "stdout" if rank == 0 else not self._is_interrupted:
            self._print(rank, host, text)

    def _print(self, rank: int, host: str, text: str) -> None:
        print(f"[{rank} {host}] {text}", file=self._stderr, flush=True)
