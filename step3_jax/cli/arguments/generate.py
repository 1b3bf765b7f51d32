"""Options of `step3 generate`."""

from __future__ import annotations

import argparse

from step3_jax.cli.arguments.engine import add_engine
from step3_jax.cli.option import add_model, add_sampling, add_tools


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add_model(parser)
    parser.add_argument("-p", "--prompt", metavar="TEXT", help="the prompt; - reads it from standard input")
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="an image for the prompt; may be repeated"
    )
    parser.add_argument("--system", metavar="TEXT", help="a system message before the prompt")
    parser.add_argument(
        "--raw", action="store_true", help="pass the prompt to the model unchanged, without the chat template"
    )
    add_tools(parser)
    add_sampling(parser)
    add_engine(parser, without=["seed"])
    group = parser.add_argument_group("output")
    group.add_argument("--n", type=int, default=1, metavar="N", help="number of answers (needs a temperature)")
    group.add_argument("--json", action="store_true", help="print one JSON object")
    group.add_argument(
        "--stream", action=argparse.BooleanOptionalAction, help="show the answer while it is generated (default: yes)"
    )
    group.add_argument(
        "--reasoning",
        action=argparse.BooleanOptionalAction,
        help="show what comes before </think>, on stderr (default: only on a terminal)",
    )
    group.add_argument(
        "--logprobs", type=int, metavar="N", help="log-probabilities of the N likeliest tokens; needs --json"
    )
