"""The values of the options in `option`: the model's folder and the sampling parameters."""

from __future__ import annotations

import argparse
import pathlib
import secrets

from step3_jax import resources
from step3_jax.sampling.params import SamplingParams
from step3_jax.stored_file import require_folder

DEFAULT_MODEL = "models/step3-tiny"


def read_sampling(arguments: argparse.Namespace, *, n: int = 1, logprobs: int | None = None) -> SamplingParams:
    """The requested sampling parameters.

    Args:
      arguments: The options of `add_sampling`.
      n: Number of answers.
      logprobs: Number of likeliest tokens whose log-probabilities are returned.

    Returns:
      Parameters. They always have a seed, so that an answer can be reproduced.

    Raises:
      ValueError: For a value out of its range.
    """
    return SamplingParams(
        n=n,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        seed=secrets.randbits(31) if arguments.seed in (None, -1) else arguments.seed,
        max_tokens=arguments.max_tokens,
        stop=arguments.stop,
        ignore_eos=arguments.ignore_eos,
        logprobs=logprobs,
    )


def find_model(arguments: argparse.Namespace) -> pathlib.Path:
    """Folder of the requested model, or of the one that ships.

    Raises:
      ValueError: If there is no such folder.
    """
    if arguments.model is None:
        return resources.find(DEFAULT_MODEL)
    return require_folder(resources.find_folder(pathlib.Path(arguments.model).expanduser()))
