"""Options that several commands share: the model, and how tokens are chosen."""

from __future__ import annotations

import argparse


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the model's folder."""
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="folder of a checkpoint (default: the tiny model that ships)"
    )


def add_tools(parser: argparse.ArgumentParser) -> None:
    """Adds the tools that the model may call."""
    parser.add_argument(
        "--tools",
        metavar="FILE",
        help="a JSON list of tools, as in OpenAI's interface, that the model may call; calls are shown, not run",
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Adds how tokens are chosen and when the answer ends."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--max-tokens", type=int, default=256, metavar="N", help="most tokens of the answer (default: %(default)s)"
    )
    group.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="0 always takes the likeliest token (default: 0)"
    )
    group.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="X",
        help="sample from the likeliest tokens with this total probability",
    )
    group.add_argument("--top-k", type=int, default=0, metavar="N", help="sample from the N likeliest tokens")
    group.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        metavar="X",
        help="sample from tokens at least this fraction as likely as the likeliest",
    )
    group.add_argument(
        "--seed", type=int, metavar="N", help="makes a sampled answer reproducible (default: a new seed each time)"
    )
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="text that ends the answer and is removed from it; may be repeated",
    )
    group.add_argument("--ignore-eos", action="store_true", help="continue to --max-tokens")
