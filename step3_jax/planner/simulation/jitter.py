"""The spread of stage times: factors around a mean of 1, drawn from a seed or from measured times."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping

import numpy as np

from step3_jax.timeline.event import LANES, Lane

# Factors that are drawn at once: drawing one at a time costs twenty times as much.
_BLOCK = 4096


@dataclasses.dataclass(frozen=True)
class Jitter:
    """The spread of the times of one kind of stage.

    Attributes:
      variation: Standard deviation over mean of a log-normal distribution, which is never negative and has a long upper
        tail.
      samples: Measured times, all equally likely; their mean does not matter here. Empty for
        the log-normal distribution.
    """

    variation: float = 0.0
    samples: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not (math.isfinite(self.variation) and self.variation >= 0):
            raise ValueError(f"the variation of a time is {self.variation:g}; a number of at least 0 is needed")
        if self.samples and (not all(math.isfinite(one) and one >= 0 for one in self.samples) or not sum(self.samples)):
            raise ValueError("measured times must be numbers of at least 0, and not all of them 0")

    @property
    def is_constant(self) -> bool:
        """Whether all times are equal."""
        return not self.variation and len(set(self.samples)) <= 1

    def draw(self, rng: np.random.Generator) -> Iterator[float]:
        """An endless stream of factors with a mean of 1."""
        if self.is_constant:
            return itertools.repeat(1.0)
        return itertools.chain.from_iterable(self._draw_blocks(rng))

    def _draw_blocks(self, rng: np.random.Generator) -> Iterator[list[float]]:
        if self.samples:
            factors = np.asarray(self.samples) / np.mean(self.samples)
            while True:
                yield rng.choice(factors, _BLOCK).tolist()
        sigma = math.sqrt(math.log1p(self.variation**2))
        while True:
            yield rng.lognormal(-(sigma**2) / 2, sigma, _BLOCK).tolist()


NO_JITTER = Jitter()


class Draws:
    """Factors for the stages of each lane; the same seed gives the same ones, whatever else is drawn."""

    def __init__(self, jitter: Mapping[Lane, Jitter] | None = None, seed: int = 0) -> None:
        """Starts streams of factors.

        Args:
          jitter: Jitter of each lane; missing ones have none.
          seed: A seed of at least 0.
        """
        given = jitter or {}
        self.is_constant = all(one.is_constant for one in given.values())
        streams = np.random.SeedSequence(seed).spawn(len(LANES))
        self._factors = {
            lane: given.get(lane, NO_JITTER).draw(np.random.default_rng(stream))
            for lane, stream in zip(LANES, streams, strict=True)
        }

    def __getitem__(self, lane: Lane) -> Iterator[float]:
        return self._factors[lane]
