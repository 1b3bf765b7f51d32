"""The user's sampling parameters: names, defaults and ranges as in vLLM."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from step3_jax.sampling.structured import StructuredOutputsParams

# Below this temperature the likeliest token is taken (vLLM's constant).
GREEDY_TEMPERATURE = 1e-5
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 100.0

# Names in generation_config.json that may override the class defaults (vLLM's list), and ours.
_MODEL_DEFAULTS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is sampled and when it ends.

    Attributes:
      n: Completions of one prompt, each with its own random numbers.
      temperature: Logits are divided by it; 0 takes the likeliest token.
      top_k: Only the k likeliest tokens; 0 or -1 for all.
      top_p: Only the likeliest tokens that together reach this probability.
      min_p: Only tokens at least this fraction as likely as the likeliest.
      seed: Seed of the request's random numbers; None, or -1 as in vLLM, draws one from the `LLM`'s own seed.
      repetition_penalty: Logits of tokens in the prompt or the output are divided by it (multiplied, if negative).
      presence_penalty: Subtracted from the logits of tokens in the output.
      frequency_penalty: Subtracted from the logits of tokens in the output, once for each occurrence.
      logit_bias: Added to the logits of these token ids, -100 to 100.
      max_tokens: Tokens of a completion; None continues to the end of the context.
      min_tokens: Until this many tokens, only `max_tokens` ends the completion.
      stop: Strings that end the completion; a single string becomes a tuple of one.
      stop_after: Text that must come before `stop` counts: "</think>" for strings that end the answer and not the
        reasoning before it. "" counts from the start.
      stop_token_ids: Tokens that end the completion, besides the model's own.
      ignore_eos: Whether the model's own end tokens do not end the completion.
      include_stop_str_in_output: Whether the text keeps the stop string.
      skip_special_tokens: Whether special tokens are left out of the text.
      detokenize: Whether to produce text at all.
      structured_outputs: What the output must match; None for anything. In an output that starts with reasoning, it applies
        after `</think>`. Needs the extra `grammar`.
      logprobs: Log-probabilities of this many likeliest tokens at each step, and of the chosen one; None for none.

    Raises:
      ValueError: For a value out of its range; the message names it, the value and the range.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] = ()
    stop_after: str = ""
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    detokenize: bool = True
    logprobs: int | None = None
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        _check_whole("n", self.n, lowest=1)
        _check_number("temperature", self.temperature, "at least 0", lowest=0.0)
        _check_whole("top_k", self.top_k, lowest=-1)
        _check_number("top_p", self.top_p, "above 0 and at most 1", highest=1.0, above=0.0)
        _check_number("min_p", self.min_p, "from 0 to 1", lowest=0.0, highest=1.0)
        _check_number("repetition_penalty", self.repetition_penalty, "above 0", above=0.0)
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _check_number(name, value, "from -2 to 2", lowest=-2.0, highest=2.0)
        if self.seed is not None:
            _check_whole("seed", self.seed, lowest=-(2**63), highest=2**64 - 1)
        if self.max_tokens is not None:
            _check_whole("max_tokens", self.max_tokens, lowest=1)
        _check_whole("min_tokens", self.min_tokens, lowest=0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens is {self.min_tokens}; it must be at most max_tokens, which is {self.max_tokens}"
            )
        if self.logprobs is not None:
            _check_whole("logprobs", self.logprobs, lowest=0, highest=MAX_LOGPROBS)
        if self.n > 1 and self.is_greedy:
            raise ValueError(
                f"n is {self.n} at temperature {self.temperature}, where all completions are the same; give n=1 or a "
                "higher temperature"
            )
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "detokenize"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; True or False is needed")
        if not isinstance(self.stop_after, str):
            raise ValueError(f"stop_after is {self.stop_after!r}; a string is needed")
        form = self.structured_outputs
        if form is not None and not isinstance(form, StructuredOutputsParams):
            raise ValueError(f"structured_outputs is {form!r}; StructuredOutputsParams(...) is needed")
        if form is not None and self.ignore_eos:
            raise ValueError("ignore_eos cannot be combined with structured_outputs, which say where the output ends")
        # The class is frozen, so normalised values bypass its guard.
        if self.seed == -1:
            object.__setattr__(self, "seed", None)
        object.__setattr__(self, "stop", _strings(self.stop))
        object.__setattr__(self, "stop_token_ids", _token_ids(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        if self.stop and not self.detokenize:
            raise ValueError("stop strings need the text: leave detokenize at True, or give stop_token_ids")

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def has_penalties(self) -> bool:
        """Whether token counts are needed."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @classmethod
    def from_generation_config(cls, values: Mapping[str, object]) -> SamplingParams:
        """The defaults of a model: this class's, overridden by `generation_config.json`.

        Args:
          values: The file's content; keys that are not sampling values (and nulls) are ignored, as in vLLM.

        Raises:
          ValueError: For a value out of range.
        """
        try:
            return cls(**pick_defaults(values))  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"generation_config.json: {error}") from None


def pick_defaults(values: Mapping[str, object]) -> dict[str, object]:
    """The sampling values of `generation_config.json`, by the names of `SamplingParams`."""
    return {ours: values[theirs] for theirs, ours in _MODEL_DEFAULTS.items() if values.get(theirs) is not None}


def _check_whole(name: str, value: object, *, lowest: int, highest: int | None = None) -> None:
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if is_whole and value >= lowest and (highest is None or value <= highest):  # type: ignore[operator]
        return
    limit = f"at least {lowest}" if highest is None else f"from {lowest} to {highest}"
    raise ValueError(f"{name} is {value!r}; a whole number {limit} is needed")


def _check_number(
    name: str,
    value: object,
    allowed: str,
    *,
    lowest: float = -math.inf,
    highest: float = math.inf,
    above: float = -math.inf,
) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if is_number and lowest <= value <= highest and value > above:  # type: ignore[operator]
        return
    raise ValueError(f"{name} is {value!r}; a number {allowed} is needed")


def _strings(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, Sequence) or not all(isinstance(item, str) and item for item in strings):
        raise ValueError(f"stop is {value!r}; a string or a list of strings is needed, none of them empty")
    return tuple(strings)


def _token_ids(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"stop_token_ids is {value!r}; a list of token ids is needed")
    for token in value:
        _check_whole("a token of stop_token_ids", token, lowest=0)
    return tuple(dict.fromkeys(value))


def _biases(value: object) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise ValueError(f"logit_bias is {value!r}; token ids with numbers are needed, as {{13: -100}}")
    for token, bias in value.items():
        _check_whole("a token of logit_bias", token, lowest=0)
        limit = MAX_LOGIT_BIAS
        _check_number(f"logit_bias of token {token}", bias, "from -100 to 100", lowest=-limit, highest=limit)
    return {token: float(bias) for token, bias in value.items()}
