"""A rank above 0 of a command that runs a model: it works for rank 0, and reads only the options about the model."""

from __future__ import annotations

import argparse

from step3_jax.cli.choice import find_model
from step3_jax.cli.engine import load_llm, read_engine


def run(arguments: argparse.Namespace) -> int:
    """Runs rank 0's calls until rank 0 says goodbye.

    Raises:
      ValueError: For options that do not fit the processes, and for everything that the checkpoint refuses.
      RunLostError: If rank 0 is lost.
    """
    if arguments.print_config:
        return 0
    choice = read_engine(arguments)
    # It does not return: the calls are made inside.
    load_llm(choice, find_model(arguments))
    raise ValueError("this rank has no part in the model: leave out step3 launch")
