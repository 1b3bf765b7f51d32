"""Where the service's log goes: to stderr by a thread, so that no request waits for a slow or full disk."""

from __future__ import annotations

import logging
import logging.handlers
import queue

# Lines that wait to be written; what comes beyond is dropped.
MAX_WAITING = 10_000
_FORM = "%(asctime)s %(levelname)s %(message)s"


class _Handler(logging.StreamHandler):
    """Passes over what cannot be written."""

    def handleError(self, record: logging.LogRecord) -> None:
        """The disk is full, or the reader is gone: there is nothing that can be done."""


class _QueueHandler(logging.handlers.QueueHandler):
    """Passes over what the queue has no room for."""

    def handleError(self, record: logging.LogRecord) -> None:
        """The writer is too slow."""


def start_log(level: str | None = None) -> logging.handlers.QueueListener:
    """Writes what the service logs to stderr from now on; `stop()` of what is returned writes the rest.

    Args:
      level: The least that is written, such as "error". None writes a line for each request, and what uvicorn warns of.
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
