"""Options that several commands share: the model, and how tokens are chosen."""

from __future__ import annotations

import argparse
import pathlib
import secrets

from step3_jax import resources
from step3_jax.mesh import agree
from step3_jax.sampling.params import SamplingParams
from step3_jax.stored_file import require_folder

DEFAULT_MODEL = "models/step3-tiny"


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the model's folder."""
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="folder of a checkpoint (default: the tiny model that ships)"
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Adds how tokens are chosen and when the answer ends."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=int, default=256, metavar="N", help="longest answer (default: %(default)s)")
    group.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="0 takes the likeliest token (default: 0)"
    )
    group.add_argument(
        "--top-p", type=float, default=1.0, metavar="X", help="only the likeliest tokens of this total probability"
    )
    group.add_argument("--top-k", type=int, default=0, metavar="N", help="only the N likeliest tokens")
    group.add_argument(
        "--min-p", type=float, default=0.0, metavar="X", help="only tokens this fraction as likely as the likeliest"
    )
    group.add_argument("--seed", type=int, metavar="N", help="repeats a sampled answer (default: a new one each time)")
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="ends the answer, and is cut off; may be repeated"
    )
    group.add_argument("--ignore-eos", action="store_true", help="go on to --max-tokens")


def read_sampling(arguments: argparse.Namespace, *, n: int = 1, logprobs: int | None = None) -> SamplingParams:
    """The sampling parameters that were asked for.

    Args:
      arguments: With the options of `add_sampling`.
      n: Answers wanted.
      logprobs: Likeliest tokens whose log-probabilities are wanted.

    Returns:
      Parameters. They always hold a seed, so that what was said can be said again.

    Raises:
      ValueError: For a value out of its range.
    """
    return SamplingParams(
        n=n,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        # Of several processes all must draw the same.
        seed=agree(secrets.randbits(31)) if arguments.seed in (None, -1) else arguments.seed,
        max_tokens=arguments.max_tokens,
        stop=arguments.stop,
        ignore_eos=arguments.ignore_eos,
        logprobs=logprobs,
    )


def find_model(arguments: argparse.Namespace) -> pathlib.Path:
    """Folder of the model that was asked for, or of the one that ships.

    Raises:
      ValueError: If there is no such folder.
    """
    if arguments.model is None:
        return resources.find(DEFAULT_MODEL)
    return require_folder(arguments.model)
