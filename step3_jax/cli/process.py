"""The process of a command: streams that can always be written to, and a Ctrl-C that always ends it.

Nothing here imports jax.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn, TextIO

INTERRUPTED_CODE = 130
# Returns to the start of the terminal's line and clears it.
ERASE = "\r\x1b[K"
INTERRUPTED = "interrupted"
# Native code (a compiler, a collective) may keep the main thread from noticing a signal; after this it is not waited for.
NOTICE_S = 2.0
# UTF-32's mark starts with UTF-16's, so it comes first.
_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
# Handled just before the watching thread woke up.
_SLACK_S = 0.5


def repair_streams() -> None:
    """Makes the standard streams usable, whatever the process was started with.

    Characters that an encoding lacks are shown as "?". A closed standard output behaves like one whose reader has left, a
    closed standard error like the null device, and a closed standard input like an empty one.
    """
    # In the order of their numbers: the next file opened must not get a closed stream's number.
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115, PTH123
    if sys.stdout is None:
        reader, writer = os.pipe()
        os.close(reader)
        _move(writer, 1)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", errors="replace")
    if sys.stderr is None:
        _move(os.open(os.devnull, os.O_WRONLY), 2)
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="replace")
    if _is_lossy(sys.stdout) and isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


class InterruptHandler:
    """What Ctrl-C does in a command's process: it ends it at once, with one line.

    It raises an exception only where one is expected (`interruptible`): in the middle of an import or a callback of
    native code it would be lost, or look like a crash.

    Attributes:
      text: The message.
      was_raised: Whether there was an exception: work it stopped may continue in native threads, so the process must leave
        by `leave_at_once`.
    """

    def __init__(self) -> None:
        self.text = INTERRUPTED
        self.was_raised = False
        # The number of the innermost block where an exception is expected; 0 outside any.
        self._place, self._num_places = 0, 0
        self._noticed_at = -1.0
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        signal.signal(signal.SIGINT, self)
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader, writer), daemon=True).start()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self._noticed_at = time.monotonic()
        if not self._place:
            self._leave()
        self.was_raised = True
        raise KeyboardInterrupt(self.text)

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """A block in which an exception is raised."""
        outer = self._place
        self._num_places += 1
        self._place = self._num_places
        try:
            yield
        finally:
            self._place = outer

    def _is_set(self) -> bool:
        return signal.getsignal(signal.SIGINT) is self

    def _leave(self) -> NoReturn:
        # The main thread may be in the middle of a write: do not use streams.
        start = b"\n" if sys.stderr.isatty() else b""
        with contextlib.suppress(OSError):
            os.write(2, start + f"step3: {self.text}\n".encode())
        leave_at_once(INTERRUPTED_CODE)

    def _watch(self, reader: socket.socket, writer: socket.socket) -> None:
        """A thread that also sees signals, while the main thread may be in native code that runs no Python."""
        is_last = False
        with writer:
            while numbers := reader.recv(64):
                if signal.SIGINT not in numbers or not self._is_set():
                    continue
                came_at, place = time.monotonic(), self._place
                while time.monotonic() < came_at + NOTICE_S and self._place == place:
                    time.sleep(0.05)
                if self._place != place:
                    continue
                is_noticed = self._noticed_at >= came_at - _SLACK_S
                if is_noticed:
                    # A callback of native code has swallowed the exception.
                    os.kill(os.getpid(), signal.SIGINT)
                elif is_last or not place:
                    self._leave()
                else:
                    say("this step ends first; Ctrl-C again leaves at once")
                    is_last = True


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """A block in which Ctrl-C raises KeyboardInterrupt, as usual in Python; does nothing outside a command's own process."""
    handler = signal.getsignal(signal.SIGINT)
    if not isinstance(handler, InterruptHandler):
        yield
        return
    with handler.raising():
        yield


@contextlib.contextmanager
def interrupt_note(text: str) -> Iterator[None]:
    """Says `text` if there is an interrupt."""
    handler = signal.getsignal(signal.SIGINT)
    if isinstance(handler, InterruptHandler):
        handler.text, before = text, handler.text
        try:
            yield
        finally:
            handler.text = before
        return
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(text) from None


def handle_interrupts() -> InterruptHandler | None:
    """Sets up Ctrl-C handling; None where SIGINT is ignored (background jobs of a shell) or already handled."""
    is_free = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return InterruptHandler() if is_free else None


def read_stdin() -> str:
    """All of standard input as text, without the byte order mark that some shells put before piped text."""
    data = sys.stdin.buffer.read() if hasattr(sys.stdin, "buffer") else sys.stdin.read().encode()
    for mark, encoding in _MARKS.items():
        if data.startswith(mark):
            return data[len(mark) :].decode(encoding)
    return data.decode(sys.stdin.encoding or "utf-8", sys.stdin.errors or "strict")


def say(text: str) -> None:
    """Writes a line of the command's own to stderr, replacing the progress that a terminal shows."""
    start = ERASE if sys.stderr.isatty() else ""
    print(f"{start}step3: {text}", file=sys.stderr, flush=True)


def leave_at_once(code: int) -> NoReturn:
    """Ends the process without the interpreter's clean-up, in which a still running compiler would crash."""
    for stream in (sys.stdout, sys.stderr):
        # A RuntimeError if the interrupt came in the middle of a flush.
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            stream.flush()
    os._exit(code)


def _move(descriptor: int, number: int) -> None:
    if descriptor != number:
        os.dup2(descriptor, number)
        os.close(descriptor)


def _is_lossy(stream: TextIO) -> bool:
    """Whether a character that the encoding lacks would be an error. The user's choice (`:backslashreplace`) is kept."""
    is_unicode = stream.encoding.lower().replace("-", "").startswith("utf")
    return stream.errors == "strict" or (stream.errors == "surrogateescape" and not is_unicode)
