"""Options of `step3 bench serve`."""

from __future__ import annotations

import argparse
import json

from step3_jax.cli.arguments.bench_engine import read_range
from step3_jax.cli.remote_option import add_key, add_served_model

# As in `bench.serve.TARGETS`, which imports numpy.
TARGETS = ("ttft", "itl", "tpot", "e2e")


def add_serve_bench(what: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command.

    Args:
      what: The sub-commands of `step3 bench`.
    """
    parser = what.add_parser("serve", help="load on an OpenAI-compatible service: throughput, latencies, goodput")
    parser.set_defaults(remote_module="bench_serve")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="default: %(default)s")
    add_key(parser)
    add_served_model(parser)
    parser.add_argument(
        "--endpoint",
        choices=("chat/completions", "completions"),
        default="chat/completions",
        help="default: %(default)s",
    )
    load = parser.add_argument_group("load")
    how = load.add_mutually_exclusive_group()
    how.add_argument("--concurrency", type=int, metavar="N", help="closed loop: N at a time (default: 8)")
    how.add_argument("--rate", type=float, metavar="R", help="open loop: R requests per second, at random times")
    load.add_argument("--requests", type=int, metavar="N", help="default: 64, or all of --dataset")
    load.add_argument(
        "--warm-up", type=int, default=2, metavar="N", help="requests before the measurement (default: 2)"
    )
    load.add_argument("--seed", type=int, default=0, metavar="N", help="seed of lengths, words and times (default: 0)")
    load.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="most seconds without an answer (default: 600)"
    )
    given = parser.add_argument_group("requests")
    given.add_argument(
        "--dataset",
        metavar="FILE",
        help="JSON lines with messages or prompt, and max_tokens; or with prompt_tokens and output_tokens",
    )
    given.add_argument(
        "--prompt-tokens",
        type=read_range,
        default=(16, 128),
        metavar="A:B",
        help="without a dataset: lengths are drawn from (default: 16:128)",
    )
    given.add_argument(
        "--output-tokens",
        type=read_range,
        default=(8, 64),
        metavar="A:B",
        help="without a dataset: lengths are drawn from (default: 8:64)",
    )
    given.add_argument(
        "--extra-body",
        type=_read_object,
        default={"ignore_eos": True, "temperature": 0},
        metavar="JSON",
        help='further fields of each request (default: {"ignore_eos": true, "temperature": 0})',
    )
    found = parser.add_argument_group("figures")
    found.add_argument(
        "--goodput",
        type=_read_targets,
        default={},
        metavar="NAME:MS,...",
        help=f"count requests that meet all of these; names: {', '.join(TARGETS)}",
    )
    found.add_argument(
        "--json", metavar="FILE", help="also write the figures to FILE, which may hold those of other benches"
    )
    found.add_argument("--plot", metavar="FILE", help="draw the latencies; .png, .svg or .pdf")


def _read_object(text: str) -> dict[str, object]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text!r}; a JSON object is needed")
    return found


def _read_targets(text: str) -> dict[str, float]:
    targets = {}
    for word in text.split(","):
        name, _, limit = word.partition(":")
        try:
            targets[name] = float(limit)
        except ValueError:
            targets[name] = -1.0
        if name not in TARGETS or not targets[name] > 0:
            raise argparse.ArgumentTypeError(
                f"{word!r}; a name ({', '.join(TARGETS)}) and milliseconds are needed, such as ttft:500"
            )
    return targets
