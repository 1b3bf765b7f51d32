"""Log-probabilities of a prompt's own tokens: it is decoded instead of prefilled, with each token as the only allowed one.

So they are the same numbers that the tokens would get as an output, at the cost of a decode step each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from step3_jax.engine.request import Prompt, Request
from step3_jax.server.error import bad_request


@dataclasses.dataclass(frozen=True)
class EchoConstraint:
    """An output that starts with given tokens; see `engine.constraint.Constraint`.

    Attributes:
      token_ids: The tokens.
    """

    token_ids: tuple[int, ...]

    @property
    def begins_after(self) -> int | None:
        """It applies from the first token."""
        return None

    def begin(self) -> EchoMatcher:
        """A matcher for one output."""
        return EchoMatcher(self.token_ids)


class EchoMatcher:
    """Allows the next of the given tokens, and after them any; see `engine.constraint.Matcher`."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._token_ids = token_ids
        self._num_taken = 0

    def accept(self, token_ids: Sequence[int]) -> None:
        """Takes the next tokens."""
        self._num_taken += len(token_ids)

    def fill(self, mask: Int[np.ndarray, " words"]) -> None:
        """Sets the bit of the next token, or all."""
        if self._num_taken >= len(self._token_ids):
            mask[:] = -1
            return
        token = self._token_ids[self._num_taken]
        mask[:] = 0
        mask.view(np.uint32)[token // 32] = np.uint32(1 << token % 32)

    def find_forced(self) -> list[int]:
        """None: prefilled tokens have no log-probabilities."""
        return []


def echo_request(request: Request, max_tokens: int | None, eos_ids: Sequence[int]) -> Request:
    """A request whose output starts with its prompt, except the first token.

    Args:
      request: A checked request.
      max_tokens: Tokens to generate after the prompt; None for what is left of the context.
      eos_ids: Tokens that end an output.

    Raises:
      ApiError: 400, for a prompt with tokens that would end its output, or if there is nothing to generate.
    """
    first, *rest = request.prompt.token_ids
    params = request.params
    ends = {*eos_ids, *params.stop_token_ids}.intersection(rest)
    if ends:
        raise bad_request(
            f"the prompt has token ids {sorted(ends)}, which end an output, so it cannot be echoed with logprobs; leave "
            "them out",
            "prompt",
        )
    if max_tokens is not None and not max_tokens + len(rest):
        raise bad_request("the prompt is empty and max_tokens is 0; there is nothing to do", "max_tokens")
    return dataclasses.replace(
        request,
        prompt=Prompt((first,), cache_salt=request.prompt.cache_salt),
        params=dataclasses.replace(
            params,
            max_tokens=None if max_tokens is None else max_tokens + len(rest),
            # Stop strings and tokens apply after the prompt.
            min_tokens=params.min_tokens + len(rest),
        ),
        constraint=EchoConstraint(tuple(rest)),
    )
