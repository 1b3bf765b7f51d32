"""How long the sequences of a batch are: one number, a distribution, or a trace."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from step3_jax.layout.page import PAGE_SIZE
from step3_jax.planner.quantity import parse_tokens
from step3_jax.planner.trace_file import MAX_TOKENS, TraceRequest, count_contexts


@dataclasses.dataclass(frozen=True)
class Contexts:
    """The contexts at which tokens are decoded, and so the sequences of a batch at a random moment.

    Attributes:
      text: As given, for people.
      mean: Mean tokens in the cache of a sequence.
      deviation: Their standard deviation.
      page_mean: The same in whole pages, in tokens.
      page_deviation: Its standard deviation.
      longest: The longest context.
      prompt_tokens: Tokens of the mean prompt.
    """

    text: str
    mean: float
    deviation: float
    page_mean: float
    page_deviation: float
    longest: int
    prompt_tokens: float

    def count_busiest(
        self, rows: Float[np.ndarray, " N"], num_devices: int, *, is_paged: bool = False
    ) -> Float[np.ndarray, " N"]:
        """Tokens in the cache of the fullest device, if each has sequences of these contexts at random.

        The sum of n contexts is close to a normal distribution, and the largest of N such sums is at most
        deviation * sqrt(2 n ln N) above the mean, on average.

        Args:
          rows: Sequences of each device.
          num_devices: N.
          is_paged: Whether whole pages are counted.
        """
        mean, deviation = (self.page_mean, self.page_deviation) if is_paged else (self.mean, self.deviation)
        return rows * mean + deviation * np.sqrt(2 * rows * math.log(num_devices))


def parse_contexts(text: str, *, max_tokens: int = MAX_TOKENS) -> Contexts:
    """A context, or a distribution of contexts as CONTEXT:SHARE,CONTEXT:SHARE,...

    Args:
      text: Such as "8192", "8k" or "4k:70,32k:30"; shares are taken in proportion.
      max_tokens: Positions of the model.

    Raises:
      ValueError: If it does not have that form, a share is not above 0, or a context is longer than allowed.
    """
    contexts, shares = [], []
    for part in text.split(","):
        tokens, colon, share = part.partition(":")
        contexts.append(parse_tokens(tokens))
        try:
            shares.append(float(share) if colon else 1.0)
        except ValueError:
            shares.append(math.nan)
        if not 0 < shares[-1] < math.inf or (not colon and "," in text):
            raise ValueError(
                f"{part!r} in the distribution {text!r}: give CONTEXT:SHARE with a share above 0, as in 4k:70"
            )
        if contexts[-1] > max_tokens:
            raise ValueError(f"a context of {contexts[-1]:,} tokens; the model has {max_tokens:,} positions")
    found = _describe(text, np.array(contexts), np.array(shares))
    return dataclasses.replace(found, prompt_tokens=found.mean)


def trace_contexts(text: str, requests: Sequence[TraceRequest]) -> Contexts:
    """The contexts of a trace.

    Args:
      text: The file's name.
      requests: At least one request.
    """
    contexts, counts = count_contexts(requests)
    found = _describe(text, contexts, counts)
    return dataclasses.replace(found, prompt_tokens=sum(one.prompt_tokens for one in requests) / len(requests))


def _describe(text: str, contexts: np.ndarray, weights: np.ndarray) -> Contexts:
    shares = weights / weights.sum()

    def moments(values: np.ndarray) -> tuple[float, float]:
        mean = float(shares @ values)
        return mean, math.sqrt(float(shares @ (values - mean) ** 2))

    pages = -(-contexts // PAGE_SIZE) * PAGE_SIZE
    return Contexts(text, *moments(contexts), *moments(pages), int(contexts.max()), 0.0)
