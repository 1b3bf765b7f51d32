"""Options of commands that talk to a service."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping

KEY_VARIABLE = "STEP3_API_KEY"


def add_key(parser: argparse.ArgumentParser) -> None:
    """Adds --api-key."""
    parser.add_argument("--api-key", metavar="KEY", help=f"of the service (default: ${KEY_VARIABLE})")


def read_key(arguments: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> str | None:
    """The key of the command line, or else of the environment. A key that is meant for others is never sent."""
    return arguments.api_key or environment.get(KEY_VARIABLE) or None
