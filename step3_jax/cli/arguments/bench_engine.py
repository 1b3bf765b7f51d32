"""Options of `step3 bench throughput` and `step3 bench latency`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable

from step3_jax.cli.arguments.engine import add_engine


def add_engine_benches(
    what: argparse._SubParsersAction[argparse.ArgumentParser],
    presets: Iterable[str],
    *,
    numbers: Callable[[str], list[int]],
    dtypes: Callable[[str], list[str]],
) -> None:
    """Adds the two commands.

    Args:
      what: The sub-commands of `step3 bench`.
      presets: Names of models.
      numbers: Reads a list of numbers.
      dtypes: Reads a list of dtypes.
    """
    throughput = what.add_parser(
        "throughput", help="requests of mixed lengths, and the engine's overhead over its calls"
    )
    _add_common(throughput, presets)
    throughput.add_argument("--requests", type=int, default=64, metavar="N", help="default: %(default)s")
    throughput.add_argument(
        "--prompt-tokens",
        type=read_range,
        default=(16, 128),
        metavar="A:B",
        help="lengths are drawn from (default: 16:128)",
    )
    throughput.add_argument(
        "--output-tokens",
        type=read_range,
        default=(8, 64),
        metavar="A:B",
        help="lengths are drawn from (default: 8:64)",
    )
    throughput.add_argument(
        "--lengths", metavar="FILE", help='JSON lines {"prompt_tokens": N, "output_tokens": N} instead of the ranges'
    )
    throughput.add_argument(
        "--torch", action="store_true", help="measure PyTorch with static batches on the same weights"
    )
    throughput.add_argument(
        "--torch-python", metavar="PATH", help="interpreter that has torch and numpy; implies --torch"
    )
    throughput.add_argument("--torch-dtype", type=dtypes, default=["float32"], metavar="A,B", help="default: float32")
    throughput.add_argument(
        "--scaling", action="store_true", help="measure how cost grows with sequences, prompts and requests instead"
    )
    throughput.add_argument("--sequences", type=numbers, default=[1, 8, 64, 256], metavar="N,N", help="of --scaling")
    throughput.add_argument(
        "--prompts",
        type=numbers,
        default=[64, 256, 1024, 4096, 8192],
        metavar="N,N",
        help="tokens of the prompts of --scaling (default: 64,256,1024,4096,8192)",
    )
    throughput.add_argument(
        "--memory-requests",
        type=numbers,
        default=[100, 5000, 5000],
        metavar="N,N",
        help="--scaling reads the memory after each of these (default: 100,5000,5000)",
    )
    latency = what.add_parser(
        "latency", help="time to the first token and between tokens: alone, during a long prefill, with a cached prompt"
    )
    _add_common(latency, presets)
    latency.add_argument(
        "--prompt", type=int, default=128, metavar="N", help="tokens of a stream's prompt (default: 128)"
    )
    latency.add_argument("--output", type=int, default=64, metavar="N", help="tokens of a stream (default: 64)")
    latency.add_argument(
        "--arriving", type=int, default=4096, metavar="N", help="tokens of the long prompt that arrives (default: 4096)"
    )
    latency.add_argument(
        "--cached", type=int, default=2048, metavar="N", help="tokens of a prompt, 90 %% cached (2048)"
    )


def _add_common(parser: argparse.ArgumentParser, presets: Iterable[str]) -> None:
    parser.add_argument("--preset", choices=list(presets), default="100m", help="size of the model (default: 100m)")
    parser.add_argument(
        "--rounds", type=int, default=4, metavar="N", help="rounds, of which medians are reported (default: 4)"
    )
    parser.add_argument(
        "--json", metavar="FILE", help="also write the figures to FILE, which may hold those of the other benches"
    )
    add_engine(parser, ("batch", "cache"))


def read_range(text: str) -> tuple[int, int]:
    """Reads A:B."""
    try:
        low, high = (int(word) for word in text.split(":"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; two whole numbers are needed, such as 16:256") from None
    return low, high
