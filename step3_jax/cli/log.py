"""The log of a command: the package's log goes to stderr, from a given level. Nothing here imports jax."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Mapping

LEVELS = ("debug", "info", "warning", "error")
LOG_LEVEL = "STEP3_LOG_LEVEL"
_DEFAULT = "warning"


def add_log_options(parser: argparse.ArgumentParser) -> None:
    """Adds --debug and --log-level both to a command and before its name: neither may overwrite the other."""
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the log, and where an error comes from"
    )
    parser.add_argument(
        "--log-level",
        choices=LEVELS,
        default=argparse.SUPPRESS,
        help=f"what of the log is shown, on stderr (default: {LOG_LEVEL}, else {_DEFAULT})",
    )


def read_level(arguments: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> str | None:
    """The requested level; None if not given.

    Args:
      arguments: Has `debug` and `log_level`, if they were given.
      environment: Where `STEP3_LOG_LEVEL` is looked up.

    Raises:
      ValueError: If the variable's value is not one of `LEVELS`.
    """
    if getattr(arguments, "debug", False):
        return "debug"
    given = getattr(arguments, "log_level", None) or environment.get(LOG_LEVEL, "").lower() or None
    if given is not None and given not in LEVELS:
        raise ValueError(f"{LOG_LEVEL} is {environment[LOG_LEVEL]!r}; allowed: {', '.join(LEVELS)}")
    return given


def start_log(level: str | None) -> None:
    """Shows what the package logs from now on.

    Args:
      level: One of `LEVELS`; None shows warnings and errors.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("step3_jax")
    logger.addHandler(handler)
    logger.setLevel((level or _DEFAULT).upper())
    # Orbax adds a handler to the root logger.
    logger.propagate = False
