"""Shows on a terminal that something slow is running, and for how long."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

from step3_jax.cli.process import ERASE

# Anything shorter is not worth a line.
_PATIENCE_S = 0.5
_EVERY_S = 0.5


@contextlib.contextmanager
def show_progress(what: str) -> Iterator[None]:
    """Shows `what` and the seconds so far in a line on stderr, and removes the line at the end; only on a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    is_over = threading.Event()
    begin = time.monotonic()

    def show() -> None:
        is_shown = False
        wait_s = _PATIENCE_S
        while not is_over.wait(wait_s):
            sys.stderr.write(f"{ERASE}{what} ... {time.monotonic() - begin:.0f} s")
            sys.stderr.flush()
            is_shown, wait_s = True, _EVERY_S
        if is_shown:
            sys.stderr.write(ERASE)
            sys.stderr.flush()

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
