"""How much one decode call does: depends on what waits for it, and on how long recent steps took."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from step3_jax.engine.sequence import Sequence
from step3_jax.engine.state import Report

# A call whose result arrives faster had ended before it was waited for.
_READY_S = 1e-3


class CallSize(NamedTuple):
    """The most that a decode call does: steps, and tokens per sequence, which are more where tokens are guessed."""

    num_steps: int
    num_tokens: int


class Pace:
    """Chooses the size of decode calls, and measures their steps."""

    def __init__(self, *, max_steps: int, max_call_ms: float, step_width: int = 1) -> None:
        """Takes the bounds.

        Args:
          max_steps: The most tokens per sequence that a call has room for.
          max_call_ms: The longest call, in milliseconds.
          step_width: The most tokens per sequence that a step generates.
        """
        self._max_steps = max_steps
        self._max_call_s = max_call_ms / 1000
        self._step_width = step_width
        self._step_s = 0.0

    def choose(self, ready: Iterable[Sequence], *, has_prefill: bool) -> CallSize:
        """The size of the next call: one step while a prompt or a first token waits, else as many as fit in its time.

        Args:
          ready: The sequences that decode, at least one.
          has_prefill: Whether others have tokens to prefill.
        """
        sequences = list(ready)
        shortest = min(self._max_steps, *(one.steps_per_call for one in sequences))
        num_steps = shortest
        if has_prefill or any(one.is_masked or not one.num_output for one in sequences):
            num_steps = 1
        elif self._step_s > 0:
            num_steps = min(num_steps, max(1, int(self._max_call_s / self._step_s)))
        # A streamed piece never exceeds its limit, except that the first token of a step is always taken.
        return CallSize(num_steps, max(1, min(num_steps * self._step_width, shortest)))

    def measure(self, report: Report, elapsed_s: float, waited_s: float) -> float:
        """Records how long a call took.

        Args:
          report: What it generated.
          elapsed_s: From its dispatch, or from the end of the chunk before it, to its end.
          waited_s: How long it was waited for.

        Returns:
          Its time; estimated from earlier steps if it had ended before it was waited for, when `elapsed_s` says too much.
        """
        num_steps = max(1, report.num_steps)
        if waited_s < _READY_S and self._step_s:
            elapsed_s = min(elapsed_s, self._step_s * num_steps)
        self._step_s = elapsed_s / num_steps
        return elapsed_s
