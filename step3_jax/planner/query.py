"""The query of a search, and its results."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from step3_jax.config import ModelConfig
from step3_jax.gpu import MEMORY_SHARE
from step3_jax.layout.deployment import Deployment
from step3_jax.layout.workspace import DEFAULT_CHUNK_TOKENS
from step3_jax.planner.candidate import Candidate, Pool
from step3_jax.planner.context import Contexts
from step3_jax.planner.estimate import Judge
from step3_jax.planner.expectation import Expectation
from step3_jax.planner.expert_load import ExpertLoad
from step3_jax.planner.own_measurement import OwnMeasurement

# What limits a batch.
TARGET, FIRST_TOKEN_TARGET, MEMORY = "target time per token", "target time to the first token", "memory"


@dataclasses.dataclass(frozen=True)
class Query:
    """The query.

    Attributes:
      config: The model's configuration.
      weights: Format of the weights.
      kv_cache: Format of the pages.
      contexts: Contexts of the sequences.
      load: Load of the experts.
      pools: The inventory.
      target_s: Most seconds per token.
      first_token_s: Most seconds to the first token of the mean prompt, without waiting for others; None for any.
      judge: The times that targets and cost apply to.
      text_only: Whether the vision tower is left out.
      chunk_tokens: Prompt tokens that each device with a cache prefills at once.
      memory_share: The usable share of a device's memory.
      measurements: The user's own, which replace published shares on their hardware.

    Raises:
      ValueError: If a number is out of its range, or there are no devices.
    """

    config: ModelConfig
    weights: str
    kv_cache: str
    contexts: Contexts
    load: ExpertLoad
    pools: Sequence[Pool]
    target_s: float
    first_token_s: float | None = None
    judge: Judge = "expected"
    text_only: bool = False
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS
    memory_share: float = MEMORY_SHARE
    measurements: Sequence[OwnMeasurement] = ()

    def __post_init__(self) -> None:
        if not self.pools:
            raise ValueError("there are no devices to search; give at least one kind")
        for name, seconds in (("a token", self.target_s), ("the first token", self.first_token_s)):
            if seconds is not None and not 0 < seconds < math.inf:
                raise ValueError(f"the target of {name} is {seconds:g} s; a number above 0 is needed")
        if self.chunk_tokens < 1:
            raise ValueError(f"prompts are prefilled in chunks of {self.chunk_tokens} tokens; at least 1 is needed")
        if not 0 < self.memory_share <= 1:
            raise ValueError(f"the share of the memory is {self.memory_share:g}; above 0 and at most 1 is allowed")

    @property
    def has_prices(self) -> bool:
        """Whether all devices have a price; else the fewest device seconds of a token count as the lowest cost."""
        return all(pool.usd_per_hour is not None for pool in self.pools)


@dataclasses.dataclass(frozen=True)
class Speed:
    """How fast a deployment is, and what it costs.

    Attributes:
      step_s: Seconds per token.
      first_token_s: Seconds to the first token of the mean prompt, without waiting for others.
      tokens_per_s: Tokens per second of all sequences.
      tokens_per_s_per_device: The same divided by all devices.
      usd_per_million_tokens: None without prices.
      binds: The bottleneck of the step.
    """

    step_s: float
    first_token_s: float
    tokens_per_s: float
    tokens_per_s_per_device: float
    usd_per_million_tokens: float | None
    binds: str

    @property
    def tokens_per_s_per_user(self) -> float:
        """Tokens per second of one sequence."""
        return 1 / self.step_s


@dataclasses.dataclass(frozen=True)
class Found:
    """A deployment with its batch.

    Attributes:
      candidate: Its devices.
      deployment: Its deployment file.
      rows: Sequences of a device with a cache, in a micro-batch.
      kv_tokens: Tokens of KV cache that fit, on all devices.
      ideal: With every device at its peak or bandwidth, and no device with more than the mean.
      expected: With published shares of that.
      expectation: These shares.
      limit: What limits the batch: `TARGET`, `FIRST_TOKEN_TARGET` or `MEMORY`.
    """

    candidate: Candidate
    deployment: Deployment
    rows: int
    kv_tokens: int
    ideal: Speed
    expected: Speed
    expectation: Expectation
    limit: str

    @property
    def sequences(self) -> int:
        """Total sequences in flight."""
        return self.rows * self.deployment.num_microbatches * self.candidate.num_attention

    def speed(self, judge: Judge) -> Speed:
        """One of the two."""
        return self.ideal if judge == "ideal" else self.expected
