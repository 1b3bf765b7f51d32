"""What the ranks write: rank 0's standard output as it is, all else line by line on stderr with its rank in front."""

from __future__ import annotations

import collections
from typing import BinaryIO, TextIO

# Lines of a rank kept for the message about its failure.
_TAIL_LINES = 20
# A line without an end is shown when it is this long.
_MAX_LINE_BYTES = 2**16


class Log:
    """Shows the output of all ranks."""

    def __init__(self, stdout: BinaryIO, stderr: TextIO) -> None:
        """Begins with nothing shown.

        Args:
          stdout: Takes rank 0's standard output, byte by byte.
          stderr: Takes everything else.
        """
        self._stdout = stdout
        self._stderr = stderr
        self._parts: dict[tuple[int, str], bytes] = {}
        self._tails: dict[int, collections.deque[str]] = {}
        self._is_interrupted = False

    def interrupt(self) -> None:
        """From now on only rank 0 is shown: what the others write of peers that are being ended is of no use."""
        self._is_interrupted = True

    def push(self, rank: int, host: str, stream: str, data: bytes) -> None:
        """Shows bytes that a rank wrote to "stdout" or "stderr".

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
        """Shows what a rank wrote without an end of line; it will write no more."""
        for stream in ("stdout", "stderr"):
            if rest := self._parts.pop((rank, stream), b""):
                self._show(rank, host, stream, rest)

    def note(self, text: str) -> None:
        """Writes a line of the launcher's own."""
        print(f"step3 launch: {text}", file=self._stderr, flush=True)

    def note_host(self, host: str, text: str) -> None:
        """Writes a line that a host itself printed, such as one of ssh."""
        print(f"[{host}] {text}", file=self._stderr, flush=True)

    def tail(self, rank: int) -> list[str]:
        """The last lines of a rank, of both its streams."""
        return list(self._tails.get(rank, ()))

    def _show(self, rank: int, host: str, stream: str, line: bytes) -> None:
        # A progress bar writes its states over one another: the last one is what a reader would see.
        text = line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace")
        self._tails.setdefault(rank, collections.deque(maxlen=_TAIL_LINES)).append(text)
        is_shown = stream != "stdout" if rank == 0 else not self._is_interrupted
        if is_shown:
            print(f"[{rank} {host}] {text}", file=self._stderr, flush=True)
