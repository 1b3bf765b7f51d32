"""The process of a command: streams that can always be written to, and Ctrl-C that always ends it.

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
from types import FrameType
from typing import NoReturn, TextIO

INTERRUPTED_CODE = 130
# Back to the start of the terminal's line, and nothing on it.
ERASE = "\r\x1b[K"
INTERRUPTED = "interrupted"
# Native code (a compiler, a collective) may keep the main thread from noticing a signal; after this it is not waited for.
NOTICE_S = 2.0
# UTF-32 begins as UTF-16 does, so it comes first.
_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
# Handled shortly before the watching thread woke up.
_SLACK_S = 0.5


def repair_streams() -> None:
    """Makes standard streams usable whatever the process was started with.

    Characters that an encoding lacks are shown as "?". A closed standard output behaves as one whose reader has left, a
    closed standard error as the null device, and a closed standard input as an empty one.
    """
    # In the order of their numbers: what is opened next must not land in a closed stream's place.
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


def watch_interrupts(*, ends_process: bool = True) -> threading.Event:
    """Sees to it that Ctrl-C is answered soon, even while the main thread is in native code that runs no Python.

    Does nothing where SIGINT is ignored (background jobs of a shell) or handled by another.

    Args:
      ends_process: Whether an interrupt that the main thread does not notice ends the process. Else (a conversation,
        where it ends an answer) the second one does.

    Returns:
      Set once there was an interrupt: what it stopped may go on in native threads, so the process is to leave by
      `leave_at_once`.
    """
    was_interrupted = threading.Event()
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return was_interrupted
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    noticed_at = -1.0

    def notice(number: int, frame: FrameType | None) -> None:
        nonlocal noticed_at
        noticed_at = time.monotonic()
        was_interrupted.set()
        signal.default_int_handler(number, frame)

    def watch() -> None:
        is_last = ends_process
        with writer:
            while numbers := reader.recv(64):
                if signal.SIGINT not in numbers or signal.getsignal(signal.SIGINT) is not notice:
                    continue
                began_at = time.monotonic()
                while (is_waiting := noticed_at < began_at - _SLACK_S) and time.monotonic() < began_at + NOTICE_S:
                    time.sleep(0.05)
                if is_waiting and is_last:
                    say(INTERRUPTED)
                    leave_at_once(INTERRUPTED_CODE)
                if is_waiting:
                    say("this step ends first; Ctrl-C again leaves at once")
                is_last = ends_process or is_waiting

    signal.signal(signal.SIGINT, notice)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True).start()
    return was_interrupted


def read_stdin() -> str:
    """All of standard input as text, without the byte order mark that some shells put in front of what they pipe."""
    data = sys.stdin.buffer.read() if hasattr(sys.stdin, "buffer") else sys.stdin.read().encode()
    for mark, encoding in _MARKS.items():
        if data.startswith(mark):
            return data[len(mark) :].decode(encoding)
    return data.decode(sys.stdin.encoding or "utf-8", sys.stdin.errors or "strict")


def say(text: str) -> None:
    """Writes a line of the command's own on stderr, in place of what a terminal shows of its progress."""
    start = ERASE if sys.stderr.isatty() else ""
    print(f"{start}step3: {text}", file=sys.stderr, flush=True)


def leave_at_once(code: int) -> NoReturn:
    """Ends the process without the interpreter's clean-up, in which a compiler that still runs would crash."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _move(descriptor: int, number: int) -> None:
    if descriptor != number:
        os.dup2(descriptor, number)
        os.close(descriptor)


def _is_lossy(stream: TextIO) -> bool:
    """Whether a character that the encoding lacks would be an error. What the user chose (`:backslashreplace`) stays."""
    is_unicode = stream.encoding.lower().replace("-", "").startswith("utf")
    return stream.errors == "strict" or (stream.errors == "surrogateescape" and not is_unicode)
