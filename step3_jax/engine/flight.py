"""What the core has in flight, and what it is told."""

from __future__ import annotations

import dataclasses

from step3_jax.engine.executor import Started
from step3_jax.engine.scheduler import Chunk
from step3_jax.engine.sequence import Sequence
from step3_jax.engine.state import ExpertTokens, Report


@dataclasses.dataclass
class Flight:
    """The calls of one step that were dispatched.

    Attributes:
      start_s: When they were dispatched, on the engine's clock.
      chunks: The chunks that are prefilled.
      prefill: The call that does it.
      slots: The sequences of the decode call in their slots; None where there is nothing to do.
      decode: The decode call.
      num_steps: The most steps it takes.
    """

    start_s: float
    chunks: list[Chunk] = dataclasses.field(default_factory=list)
    prefill: Started[ExpertTokens] | None = None
    slots: list[Sequence | None] = dataclasses.field(default_factory=list)
    decode: Started[Report] | None = None
    num_steps: int = 0


@dataclasses.dataclass(frozen=True)
class Abort:
    """A request, or one of its sequences, to abort."""

    request_id: str
    index: int | None
