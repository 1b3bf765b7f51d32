"""Options of `step3 plan memory`."""

from __future__ import annotations

import argparse
from typing import get_args

from step3_jax.cli.arguments.setting import read_object
from step3_jax.cli.dtype import dtype_name
from step3_jax.config import PRESETS
from step3_jax.gpu import MEMORY_SHARE
from step3_jax.layout.page import KV_CACHE_DTYPES
from step3_jax.layout.parallel import VisionForm
from step3_jax.layout.weight_form import WEIGHTS
from step3_jax.layout.workspace import DEFAULT_CHUNK_TOKENS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument(
        "deployment", metavar="DEPLOYMENT", help="a file as in configs/afd, or the name of one there: 2a2f"
    )
    parser.add_argument(
        "--model", default="step3", metavar="NAME", help=f"{', '.join(PRESETS)}, or a folder with config.json (step3)"
    )
    parser.add_argument("--text-only", action="store_true", help="without the vision tower")
    parser.add_argument(
        "--no-compile", action="store_true", help="compute the bytes without compiling: quick, and the same result"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    change = parser.add_argument_group("instead of the file's values")
    change.add_argument("--weights", type=dtype_name(WEIGHTS), choices=WEIGHTS)
    change.add_argument("--kv-cache-dtype", type=dtype_name(KV_CACHE_DTYPES), choices=KV_CACHE_DTYPES)
    change.add_argument(
        "--mm-encoder-tp-mode",
        choices=get_args(VisionForm),
        help="weights: the vision tower is sharded across the devices of a group; data: each has a copy",
    )
    change.add_argument("--sequences", type=int, metavar="N", help="total of sequences at a time")
    change.add_argument("--context-tokens", type=int, metavar="N", help="tokens of each sequence")
    change.add_argument("--hardware", metavar="NAME", help="a device of configs/hardware")
    change.add_argument("--memory-gib", type=float, metavar="X", help="memory of a device")
    more = parser.add_argument_group("memory for other purposes")
    more.add_argument(
        "--memory-share",
        type=float,
        default=MEMORY_SHARE,
        metavar="X",
        help="share of a device's memory that may be used; the driver and NCCL take some (default: %(default)s)",
    )
    more.add_argument(
        "--max-num-batched-tokens",
        type=int,
        default=DEFAULT_CHUNK_TOKENS,
        metavar="N",
        help="prompt tokens that each device prefills at once (default: %(default)s)",
    )
    more.add_argument(
        "--speculative-config",
        type=read_object,
        metavar="JSON",
        help="as for an engine: counts the tokens of a step with guesses, and those that guesses are looked up in",
    )
