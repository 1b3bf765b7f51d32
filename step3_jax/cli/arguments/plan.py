"""Options of `step3 plan`: one module here for each kind of plan."""

from __future__ import annotations

import argparse
import importlib

WHAT = {
    "memory": "weights, KV cache and workspace of each device, and the KV tokens that fit",
    "cost": "USD per million tokens on given hardware: ideal, and as expected from what others measured",
    "search": "the cheapest deployment of an inventory within a target time",
    "report": "the tables of the Step-3 report, recomputed next to the printed ones",
    "simulate": "simulate attention and FFN on separate devices: time per token, throughput, bubbles",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    commands = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    for name, summary in WHAT.items():
        sub = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        importlib.import_module(f"step3_jax.cli.arguments.plan_{name}").add_arguments(sub)
