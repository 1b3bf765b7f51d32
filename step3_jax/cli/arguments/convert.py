"""Options of `step3 convert`."""

from __future__ import annotations

import argparse
import os
import pathlib
import re

from step3_jax.checkpoint.form import DTYPE_CHOICES, FORMS, MAX_MEMORY
from step3_jax.cli.dtype import dtype_name

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("source", metavar="SRC", type=pathlib.Path, help="released folder, Orbax folder, training run")
    parser.add_argument("target", metavar="DST", type=pathlib.Path, help="folder to write; must not exist")
    parser.add_argument("--to", choices=FORMS, help="format of the result (default: the one that SRC does not have)")
    parser.add_argument(
        "--dtype",
        type=dtype_name(DTYPE_CHOICES),
        choices=DTYPE_CHOICES,
        help="dtype of the weights (default: unchanged); bfloat16 and float32 are accepted too",
    )
    parser.add_argument("--resume", action="store_true", help="continue a conversion that was stopped")
    parser.add_argument(
        "--verify", action="store_true", help="compare SRC and DST afterwards, or only compare if DST exists"
    )
    parser.add_argument("--dry-run", action="store_true", help="show what would be written, and write nothing")
    parser.add_argument(
        "--workers",
        type=int,
        default=min(os.cpu_count() or 1, 8),
        metavar="N",
        help="threads; they share --max-memory (default: %(default)s)",
    )
    parser.add_argument(
        "--max-memory",
        type=parse_bytes,
        default=MAX_MEMORY,
        metavar="SIZE",
        help="limit of the memory, without mapped files (default: 4GiB)",
    )
    parser.add_argument(
        "--shard-size",
        type=parse_bytes,
        default=parse_bytes("5GB"),
        metavar="SIZE",
        help="largest shard in the released layout (default: 5GB)",
    )
    parser.add_argument(
        "--companions",
        type=pathlib.Path,
        metavar="FOLDER",
        help="where config.json, tokenizer and templates are, if SRC has none (a training run)",
    )
    parser.add_argument(
        "--report", type=pathlib.Path, metavar="FILE", help="write what happened to each tensor as JSON lines"
    )


def parse_bytes(text: str) -> int:
    """ "4GiB" -> 4294967296; also 5GB, 512M, or a plain number.

    Raises:
      argparse.ArgumentTypeError: If it is not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    if match is None or match[2] not in UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; give one like 4GiB, 5GB or 500MB")
    return int(float(match[1]) * UNITS[match[2]])
