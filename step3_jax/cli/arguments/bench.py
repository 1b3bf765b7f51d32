"""Options of `step3 bench`."""

from __future__ import annotations

import argparse

from step3_jax.cli.arguments.bench_engine import add_engine_benches
from step3_jax.cli.arguments.bench_serve import add_serve_bench
from step3_jax.cli.arguments.engine import add_engine
from step3_jax.cli.dtype import dtype_name
from step3_jax.config import DTYPES
from step3_jax.layout.weight_form import QUANTIZATIONS

_DTYPE = dtype_name(DTYPES)
# Hidden size and layers. "100m" has 109M active parameters of 309M in all: more bytes than any cache holds.
# Forms of weights: a model made here has no stored form to choose from.
FORMS = tuple(name for name in QUANTIZATIONS if name != "auto")
PRESETS = {"100m": (1024, 7), "tiny": (128, 2)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    what = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    decode = what.add_parser("decode", help="decode and prefill of a model with random weights")
    decode.add_argument("--preset", choices=PRESETS, default="100m", help="size of the model (default: %(default)s)")
    decode.add_argument("--hidden", type=int, metavar="N", help="hidden size, instead of the preset's")
    decode.add_argument("--layers", type=int, metavar="N", help="layers, instead of the preset's")
    decode.add_argument("--dtype", type=_names, default=list(DTYPES), metavar="A,B", help="default: float32,bfloat16")
    decode.add_argument(
        "--quantization",
        type=_forms,
        default=["stored"],
        metavar="A,B",
        help=f"how weights are held, each measured in turn: {', '.join(FORMS)} (default: stored, in --dtype)",
    )
    decode.add_argument("--batch", type=_numbers, default=[1, 4, 16], metavar="N,N", help="default: 1,4,16")
    decode.add_argument("--steps", type=int, default=16, metavar="N", help="tokens per round (default: %(default)s)")
    decode.add_argument(
        "--rounds", type=int, default=7, metavar="N", help="rounds, of which medians are reported (default: 7)"
    )
    decode.add_argument("--prompt", type=int, default=32, metavar="N", help="prompt tokens (default: %(default)s)")
    decode.add_argument(
        "--prefill", type=int, default=512, metavar="N", help="tokens of prefill (default: %(default)s)"
    )
    add_engine(decode, ("devices",))
    decode.add_argument("--torch", action="store_true", help="measure PyTorch too, on the same weights")
    decode.add_argument("--torch-python", metavar="PATH", help="interpreter that has torch and numpy; implies --torch")
    decode.add_argument("--json", metavar="FILE", help="also write all figures to FILE")
    add_engine_benches(what, PRESETS, numbers=_numbers, dtypes=_names)
    add_serve_bench(what)


def _names(text: str) -> list[str]:
    names = [_DTYPE(word) for word in text.split(",")]
    if not set(names) <= set(DTYPES):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: {', '.join(DTYPES)}, separated by commas")
    return names


def _forms(text: str) -> list[str]:
    names = text.split(",")
    if not set(names) <= set(FORMS):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: {', '.join(FORMS)}, separated by commas")
    return names


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; whole numbers of at least 1 are needed, separated by commas")
    return numbers
