"""The user's parameters for speculation: vLLM's `speculative_config`. No jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Self

METHODS = ("ngram",)
# A decode call generates at most 32 tokens per sequence by default, and drafts of more than half of them are rarely right.
MAX_SPECULATIVE_TOKENS = 16
# Every length of n-gram is one comparison with all tokens of a sequence.
MAX_LOOKUP = 16
_DEFAULT_MAX, _DEFAULT_MIN = 5, 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speculation:
    """How tokens are guessed: those that followed the last n-gram when it came before in the same sequence.

    Attributes:
      num_speculative_tokens: Most tokens to guess at a time; the model verifies them all in one step.
      prompt_lookup_max: Longest n-gram to look for; the longest one found counts.
      prompt_lookup_min: Shortest n-gram to look for.

    Raises:
      ValueError: For a value out of its range; the message names it, the value and the range.
    """

    num_speculative_tokens: int
    prompt_lookup_max: int = _DEFAULT_MAX
    prompt_lookup_min: int = _DEFAULT_MIN

    def __post_init__(self) -> None:
        _check_whole("num_speculative_tokens", self.num_speculative_tokens, MAX_SPECULATIVE_TOKENS)
        for name in ("prompt_lookup_max", "prompt_lookup_min"):
            _check_whole(name, getattr(self, name), MAX_LOOKUP)
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ValueError(
                f"prompt_lookup_min is {self.prompt_lookup_min}; it must be at most prompt_lookup_max, which is "
                f"{self.prompt_lookup_max}"
            )

    @property
    def width(self) -> int:
        """T: tokens per sequence that a step computes, its last one and the guesses after it."""
        return 1 + self.num_speculative_tokens

    @classmethod
    def of(cls, values: Mapping[str, object]) -> Self:
        """From vLLM's names; `method` must be given. Of the two lengths of n-grams either may stand for both, as in vLLM.

        Raises:
          ValueError: For an unknown name or method, or a value out of its range; the message starts with
            speculative_config.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = [name for name in values if name not in ("method", *names)]
        if unknown:
            raise ValueError(f"speculative_config has {unknown[0]!r}; allowed: method, {', '.join(names)}")
        method = values.get("method")
        if method not in METHODS:
            given = "has no method" if method is None else f"has method {method!r}"
            raise ValueError(f"speculative_config {given}; allowed: {', '.join(METHODS)}")
        if values.get("num_speculative_tokens") is None:
            raise ValueError(
                "speculative_config has no num_speculative_tokens: the tokens to guess at a time, such as 4"
            )
        given_values = {name: values[name] for name in names if values.get(name) is not None}
        most, least = (given_values.get(f"prompt_lookup_{name}") for name in ("max", "min"))
        if most is None and least is not None:
            given_values["prompt_lookup_max"] = least
        if least is None and most is not None:
            given_values["prompt_lookup_min"] = most
        try:
            return cls(**given_values)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"speculative_config: {error}") from None


def _check_whole(name: str, value: object, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ValueError(f"{name} is {value!r}; a whole number from 1 to {most} is needed")
