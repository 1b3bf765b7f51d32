"""How evenly tokens choose their experts, and the load of the busiest device of a deployment."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib

import numpy as np
from jaxtyping import Float

from step3_jax.config import TextConfig

_MAX_CLASSES = 64


@dataclasses.dataclass(frozen=True, eq=False)
class ExpertLoad:
    """Shares of the (token, expert) pairs.

    Attributes:
      shares: For each layer with experts (or one row for all of them) and expert; rows sum to 1.
      top_k: Experts per token.
      source: Their source, for people.
    """

    shares: Float[np.ndarray, "L E"]
    top_k: int
    source: str

    @property
    def num_experts(self) -> int:
        return self.shares.shape[1]

    def find_imbalance(self, num_groups: int) -> float:
        """Pairs of the busiest group of experts relative to the mean group, averaged over the layers.

        Groups have neighbouring experts, like the shards of the weights.
        """
        groups = self.shares.reshape(len(self.shares), num_groups, -1).sum(axis=2)
        return float(groups.max(axis=1).mean()) * num_groups

    def count_busiest(
        self, tokens: Float[np.ndarray, " N"], num_groups: int, *, by_chance: bool
    ) -> Float[np.ndarray, " N"]:
        """Pairs of the busiest group.

        Args:
          tokens: Tokens that choose their experts.
          num_groups: Groups of experts.
          by_chance: Whether the batch is a random draw from the shares, rather than exactly the shares. The pairs of a
            group then vary about as a binomial count does, and the largest of G such counts is at most
            sqrt(2 variance ln G) above the mean, on average.
        """
        pairs = tokens * self.top_k
        mean = pairs * self.find_imbalance(num_groups) / num_groups
        if not by_chance or num_groups == 1:
            return mean
        share = np.minimum(mean / pairs, 1.0)
        spread = np.sqrt(2 * math.log(num_groups) * mean * (1 - share))
        # A token chooses an expert once, and the busiest group has at least one pair.
        most = tokens * min(self.top_k, self.num_experts // num_groups)
        return np.maximum(np.minimum(mean + spread, most), np.minimum(tokens, 1.0))

    def find_touched(self, tokens: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
        """The share of the experts that at least one of this many tokens chooses: their weights are read."""
        values, parts = self._classes
        return 1 - parts @ (1 - values[:, None]) ** np.asarray(tokens, float)[None, :]

    @functools.cached_property
    def _classes(self) -> tuple[Float[np.ndarray, " C"], Float[np.ndarray, " C"]]:
        """Probabilities that a token chooses an expert, and the fraction of experts that have them; a few classes."""
        chosen = np.minimum(self.shares * self.top_k, 1.0).ravel()
        values, counts = np.unique(chosen, return_counts=True)
        if len(values) > _MAX_CLASSES:
            counts, edges = np.histogram(chosen, _MAX_CLASSES)
            values = (edges[:-1] + edges[1:]) / 2
        return values, counts / chosen.size


def even_load(config: TextConfig) -> ExpertLoad:
    """All experts equally likely."""
    return ExpertLoad(
        np.full((1, config.moe_num_experts), 1 / config.moe_num_experts), config.moe_top_k, "all experts equally likely"
    )


def read_load(path: str | pathlib.Path, config: TextConfig) -> ExpertLoad:
    """Reads a measured distribution: a JSON file with the tokens of each expert, or a list of such lists, one per layer.

    Args:
      path: The file.
      config: The model's configuration.

    Raises:
      ValueError: If it cannot be read, or does not have a number of at least 0 for each expert.
    """
    file = pathlib.Path(path).expanduser()
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or error}") from None
    except ValueError:
        raise ValueError(f"{file} is not JSON; a list with the tokens of each expert is needed") from None
    rows = values if isinstance(values, list) and values and isinstance(values[0], list) else [values]
    for number, row in enumerate(rows, start=1):
        where = str(file) if rows[0] is values else f"{file}, layer {number}"
        if not isinstance(row, list) or len(row) != config.moe_num_experts:
            count = len(row) if isinstance(row, list) else "no"
            raise ValueError(f"{where}: {count} numbers; the model has {config.moe_num_experts} experts")
        wrong = [
            one for one in row if not isinstance(one, int | float) or isinstance(one, bool) or not 0 <= one < math.inf
        ]
        if wrong or not sum(row) > 0:
            raise ValueError(
                f"{where}: tokens of an expert are {wrong[0] if wrong else 0!r}; numbers of at least 0 are "
                "needed, and one above it"
            )
    if len(rows) not in (1, len(config.moe_layers)):
        raise ValueError(f"{file}: {len(rows)} layers; the model has {len(config.moe_layers)} with experts")
    counts = np.array(rows, float)
    return ExpertLoad(counts / counts.sum(axis=1, keepdims=True), config.moe_top_k, str(file))
