"""Options of `step3 chat`."""

from __future__ import annotations

import argparse

from step3_jax.cli.arguments.engine import add_engine
from step3_jax.cli.option import add_model, add_sampling, add_tools


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="a system message at the start")
    add_tools(parser)
    add_sampling(parser)
    add_engine(parser, without=["seed"])
    parser.add_argument(
        "--reasoning",
        action=argparse.BooleanOptionalAction,
        help="show what comes before </think>, on stderr (default: only on a terminal)",
    )
