"""What both roles are told about a decode call of executor `program`, and the observer of its steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array, Int

# Called after each step with its number and that of the last exchange.
Observe = Callable[[int, int], None]


class Numbers(NamedTuple):
    """What both roles are told about a decode call.

    Attributes:
      num_steps: Steps to take at most; at least 1.
      first_step: Number of the call's first step, for `Observe`.
    """

    num_steps: Int[Array, ""]
    first_step: Int[Array, ""]
