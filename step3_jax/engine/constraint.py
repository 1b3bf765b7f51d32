"""Constraints on outputs as the core sees them: which tokens may come next. No grammar and no text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Int


class Matcher(Protocol):
    """Follows one output. Each of its methods raises ValueError if the output cannot continue."""

    def accept(self, token_ids: Sequence[int]) -> None:
        """Takes the next tokens."""

    def fill(self, mask: Int[np.ndarray, " words"]) -> None:
        """Sets the bit of each allowed next token and clears the others; the lowest bit of the first word is token 0."""

    def find_forced(self) -> list[int]:
        """The forced next tokens, without end tokens; they are not taken yet."""


class Constraint(Protocol):
    """What the outputs of a request must be.

    Attributes:
      begins_after: The output token after which it starts, such as the end of the reasoning; None if it starts with
        the first token.
    """

    @property
    def begins_after(self) -> int | None: ...

    def begin(self) -> Matcher:
        """A matcher for one output."""


class SequenceConstraint:
    """The constraint of one sequence, which may go back to an earlier token when the sequence is recomputed."""

    def __init__(self, constraint: Constraint) -> None:
        """Starts with an empty output."""
        self._constraint = constraint
        self._matcher: Matcher | None = None
        self._num_seen = 0

    @property
    def is_active(self) -> bool:
        """Whether the next token is constrained, as of the last `follow`."""
        return self._matcher is not None

    def follow(self, output: Sequence[int]) -> None:
        """Takes the new tokens of an output; all of them if it is shorter than before.

        Raises:
          ValueError: If the output cannot continue.
        """
        if len(output) < self._num_seen:
            self._matcher, self._num_seen = None, 0
        new = output[self._num_seen :]
        if self._matcher is None:
            mark = self._constraint.begins_after
            if mark is not None:
                if mark not in new:
                    self._num_seen = len(output)
                    return
                new = new[new.index(mark) + 1 :]
            self._matcher = self._constraint.begin()
        self._num_seen = len(output)
        self._matcher.accept(new)

    def find_forced(self) -> list[int]:
        """The forced next tokens; none while nothing is constrained."""
        return [] if self._matcher is None else self._matcher.find_forced()

    def fill(self, mask: Int[np.ndarray, " words"]) -> None:
        """Writes which tokens are allowed next, see `Matcher.fill`; all of them while nothing is constrained."""
        if self._matcher is None:
            mask[:] = -1
        else:
            self._matcher.fill(mask)
