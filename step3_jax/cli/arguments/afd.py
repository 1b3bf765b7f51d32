"""Options of `step3 afd trace`."""

from __future__ import annotations

import argparse

from step3_jax.cli.arguments.afd_devices import add_afd
from step3_jax.cli.arguments.bench import PRESETS
from step3_jax.cli.arguments.engine import add_engine
from step3_jax.cli.option import add_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    what = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    trace = what.add_parser("trace", help="run some decode steps, and draw what each device did when")
    add_model(trace)
    trace.add_argument(
        "--preset", choices=PRESETS, help="a model with random weights of this size, instead of a checkpoint"
    )
    trace.add_argument("--batch", type=int, default=32, metavar="N", help="sequences at once (default: %(default)s)")
    trace.add_argument(
        "--prompt-tokens", type=int, default=16, metavar="N", help="tokens of each sequence (default: %(default)s)"
    )
    trace.add_argument(
        "--max-tokens", type=int, default=8, metavar="N", help="tokens of each sequence (default: %(default)s)"
    )
    trace.add_argument("--layers-shown", type=int, default=24, metavar="N", help="layers in the picture (default: 24)")
    trace.add_argument("--out", metavar="FILE.json", help="write the trace, for ui.perfetto.dev")
    trace.add_argument(
        "--picture", default="afd.svg", metavar="FILE.svg", help="where to draw it (default: %(default)s)"
    )
    trace.add_argument("--from", dest="source", metavar="FILE.json", help="draw this trace instead of making one")
    add_engine(trace, ("model",))
    add_afd(trace, default="1a1f")
