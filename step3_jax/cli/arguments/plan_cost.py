"""Options of `step3 plan cost`."""

from __future__ import annotations

import argparse

from step3_jax.cli.dtype import dtype_name
from step3_jax.planner.shape import KV_DTYPE_BYTES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument(
        "--model",
        default="step3",
        metavar="NAME",
        help="a model of configs/planner/models or configs/models, a file of that form, or a config.json (step3)",
    )
    parser.add_argument("--context", default="8k", metavar="N", help="tokens of context; 8k is 8,192 (default: 8k)")
    dtypes = tuple(KV_DTYPE_BYTES)
    parser.add_argument(
        "--kv-dtype",
        type=dtype_name(dtypes),
        choices=dtypes,
        default="fp8",
        help="KV cache; int4 is stored in 4 bits and computed with in 8 (default: fp8)",
    )
    parser.add_argument("--attention-hardware", metavar="NAME", help="of configs/hardware (default: the cheapest)")
    parser.add_argument("--ffn-hardware", metavar="NAME", help="of configs/hardware (default: the cheapest)")
    add_choice(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def add_choice(parser: argparse.ArgumentParser) -> None:
    """Adds the hardware to choose from, its prices and what the user measured on it."""
    parser.add_argument(
        "--hardware",
        action="append",
        default=[],
        metavar="NAME",
        help="hardware to choose from, by names with commas between them; may be repeated (default: all with a price)",
    )
    parser.add_argument(
        "--price",
        action="append",
        default=[],
        metavar="NAME=USD",
        help="price of an hour of one device; may be repeated",
    )
    parser.add_argument(
        "--measured",
        action="append",
        default=[],
        metavar="[NAME=]FILE",
        help="results.json of tools/gpu_check, or the JSON of step3 bench decode, on the hardware of that name",
    )
