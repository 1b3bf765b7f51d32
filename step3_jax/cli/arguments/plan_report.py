"""Options of `step3 plan report`."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument(
        "--brief", action="store_true", help="show only differences, and how well measured runs are predicted"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
