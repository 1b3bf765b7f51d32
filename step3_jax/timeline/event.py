"""The pieces of a pipeline's work, and their times."""

from __future__ import annotations

from typing import Literal, NamedTuple

Lane = Literal["attention", "to_ffn", "ffn", "to_attention"]
# A lane's work, in the words of messages.
LANES: dict[Lane, str] = {
    "attention": "the attention step",
    "to_ffn": "the exchange from attention to FFN",
    "ffn": "the FFN step",
    "to_attention": "the exchange from FFN to attention",
}


class Stage(NamedTuple):
    """One piece of work.

    Attributes:
      lane: The device, or the link between two, that it belongs to.
      phase: "prefill" or "decode".
      step: Number of the decode step, or of the chunk, since the executor was made.
      layer: Number of the layer; the number of layers means the head.
      microbatch: Number of the micro-batch.
    """

    lane: Lane
    phase: str
    step: int
    layer: int
    microbatch: int

    def __str__(self) -> str:
        return f"{LANES[self.lane]} of layer {self.layer}, micro-batch {self.microbatch} ({self.phase} {self.step})"


class Event(NamedTuple):
    """A stage that was recorded or simulated; times in seconds since the start."""

    stage: Stage
    start_s: float
    end_s: float
