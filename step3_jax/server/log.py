"""Where the service's log goes: to stderr by a thread, so that no request waits for a slow or full disk."""

from __future__ import annotations

import logging
import logging.handlers
import queue

# Lines that may wait to be written; more are dropped.
MAX_WAITING = 10_000
_FORM = "%(asctime)s %(levelname)s %(message)s"


class _Handler(logging.StreamHandler):
    """Ignores lines that cannot be written."""

    def handleError(self, record: logging.LogRecord) -> None:
        """The disk is full, or the reader is gone: nothing can be done."""


class _QueueHandler(logging.handlers.QueueHandler):
    """Drops lines when the queue is full."""

    def handleError(self, record: logging.LogRecord) -> None:
        """The writer is too slow."""


def start_log(level: str | None = None) -> logging.handlers.QueueListener:
    """Writes the service's log to stderr from now on; `stop()` of the returned listener writes the rest.

    Args:
      level: The lowest level to write, such as "error". None writes a line for each request, and uvicorn's warnings.
    """
    waiting: queue.Queue[logging.LogRecord] = queue.Queue(MAX_WAITING)
    writer = _Handler()
    writer.setFormatter(logging.Formatter(_FORM))
    listener = logging.handlers.QueueListener(waiting, writer)
    for name, default in (("step3_jax.server", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.addHandler(_QueueHandler(waiting))
        logger.propagate = False
        if level is not None:
            logger.setLevel(level.upper())
        elif logger.getEffectiveLevel() > default or logger.level == logging.NOTSET:
            logger.setLevel(default)
    listener.start()
    return listener
