"""Options of `step3 plan search`."""

from __future__ import annotations

import argparse

from step3_jax.cli.dtype import dtype_name
from step3_jax.config import PRESETS
from step3_jax.gpu import MEMORY_SHARE
from step3_jax.layout.page import KV_CACHE_DTYPES
from step3_jax.layout.workspace import DEFAULT_CHUNK_TOKENS
from step3_jax.planner.estimate import JUDGES

# A search is over GPUs, which multiply no other forms.
_WEIGHTS = ("float32", "bfloat16", "fp8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument(
        "--model", default="step3", metavar="NAME", help=f"{', '.join(PRESETS)}, or a folder with config.json (step3)"
    )
    parser.add_argument("--weights", type=dtype_name(_WEIGHTS), choices=_WEIGHTS, default="fp8", help="(default: fp8)")
    parser.add_argument(
        "--kv-cache-dtype",
        type=dtype_name(KV_CACHE_DTYPES),
        choices=KV_CACHE_DTYPES,
        default="fp8",
        help="(default: fp8)",
    )
    parser.add_argument("--text-only", action="store_true", help="without the vision tower")
    wanted = parser.add_argument_group("targets")
    wanted.add_argument(
        "--target-ms", type=float, default=50.0, metavar="MS", help="most milliseconds per output token (default: 50)"
    )
    wanted.add_argument(
        "--target-first-token-s",
        type=float,
        metavar="S",
        help="most seconds to the first token of the mean prompt, without waiting for others (default: any)",
    )
    wanted.add_argument(
        "--judge",
        choices=JUDGES,
        default=JUDGES[0],
        help="the times to compare with the targets, and to compute the cost from (default: %(default)s)",
    )
    contexts = wanted.add_mutually_exclusive_group()
    contexts.add_argument(
        "--context",
        metavar="N",
        help="tokens of a sequence: 8192, 8k (the same), or a distribution as in 4k:70,32k:30 (default: 8k)",
    )
    contexts.add_argument(
        "--trace",
        metavar="FILE",
        help='a JSON object with prompt_tokens and output_tokens on each line: {"prompt_tokens": 900, "output_tokens": 250}',
    )
    wanted.add_argument(
        "--expert-load",
        metavar="FILE",
        help="JSON with the tokens of each expert, or a list of such lists for the layers (default: all equally likely)",
    )
    devices = parser.add_argument_group("inventory")
    devices.add_argument(
        "--hardware",
        action="append",
        default=[],
        metavar="NAME:COUNT",
        help="devices of configs/hardware, or of a file of that form; repeat it for another kind",
    )
    devices.add_argument(
        "--price",
        action="append",
        default=[],
        metavar="NAME=USD",
        help="price of an hour of one device; may be repeated",
    )
    devices.add_argument(
        "--measured",
        action="append",
        default=[],
        metavar="[NAME=]FILE",
        help="results.json of tools/gpu_check, or the JSON of step3 bench decode, on the hardware of that name",
    )
    devices.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="consider only afd, ep or tp, or one deployment, such as 2a2f or ep32; may be repeated",
    )
    devices.add_argument(
        "--memory-share",
        type=float,
        default=MEMORY_SHARE,
        metavar="X",
        help="share of a device's memory that may be used (default: %(default)s)",
    )
    devices.add_argument(
        "--max-num-batched-tokens",
        type=int,
        default=DEFAULT_CHUNK_TOKENS,
        metavar="N",
        help="prompt tokens that each device prefills at once (default: %(default)s)",
    )
    show = parser.add_argument_group("output")
    show.add_argument("--top", type=int, default=5, metavar="N", help="deployments to show (default: 5)")
    show.add_argument("--picture", metavar="FILE", help="draw cost against speed: .svg or .png; needs matplotlib")
    show.add_argument("--output", metavar="FILE", help="write the best as a deployment file (.yaml)")
    show.add_argument("--json", action="store_true", help="print one JSON object")
