"""What both roles are told of a decode call of executor `program`, and who hears of its steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array, Int

# Hears of each step its number, and that of the last exchange after it.
Observe = Callable[[int, int], None]


class Numbers(NamedTuple):
    """What both roles are told of a decode call.

    Attributes:
      num_steps: Steps to take at most; at least 1.
      first_step: Number of the call's first step, for `Observe`.
    """

    num_steps: Int[Array, ""]
    first_step: Int[Array, ""]
