"""The result of a pipeline simulation, and the stages that it keeps for a picture."""

from __future__ import annotations

import dataclasses

from step3_jax.timeline.event import Event, Lane, Stage


@dataclasses.dataclass
class Run:
    """The result of a simulation.

    Attributes:
      tokens_s: When each step of each micro-batch ended on each attention instance: by step, micro-batch, instance.
      start_s: Start of the first stage.
      end_s: End of the last one.
      attention_busy_s: Busy time of each attention instance, including heads.
      ffn_busy_s: Busy time of each FFN instance.
      to_ffn_busy_s: Busy time of the ways to the FFN side: the mean of the attention instances' links.
      to_attention_busy_s: Busy time of the ways back: the mean of the attention instances' links.
      num_events: Stages that ended, including ways.
      events: Stages of the first instance of each side, if requested.
    """

    tokens_s: list[list[list[float]]]
    start_s: float
    end_s: float
    attention_busy_s: list[float]
    ffn_busy_s: list[float]
    to_ffn_busy_s: float
    to_attention_busy_s: float
    num_events: int
    events: list[Event]

    def step_ends_s(self) -> list[float]:
        """When each step had ended for all rows."""
        return [max(max(row) for row in step) for step in self.tokens_s]


class Record:
    """Keeps the stages of the first instance of each side."""

    def __init__(self, first_step: int, phase: str) -> None:
        """Starts empty.

        Args:
          first_step: Number of the first step.
          phase: "prefill" or "decode".
        """
        self.events: list[Event] = []
        self._first_step, self._phase = first_step, phase

    def add(self, lane: Lane, step: int, layer: int, microbatch: int, start_s: float, end_s: float) -> None:
        """Keeps a stage."""
        stage = Stage(lane, self._phase, self._first_step + step, layer, microbatch)
        self.events.append(Event(stage, start_s, end_s))

    def add_head(self, step: int, num_layers: int, microbatch: int, end_s: float, head_s: float) -> None:
        """A head is the attention lane's stage after the last layer."""
        if head_s:
            self.add("attention", step, num_layers, microbatch, end_s - head_s, end_s)
