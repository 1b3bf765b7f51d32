"""How tokens are chosen: turns a request's fields into the engine's parameters."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from step3_jax.sampling.batch import NUM_STOP_IDS
from step3_jax.sampling.params import GREEDY_TEMPERATURE, MAX_LOGPROBS, SamplingParams
from step3_jax.server.constraint import WantedForm, may_have_form, read_form
from step3_jax.server.error import bad_request, refused
from step3_jax.server.protocol.common import SamplingFields
from step3_jax.server.service import Service

MAX_STOPS = 4
MAX_STOP_LENGTH = 256
_SEEDS = (-(2**63), 2**63 - 1)
# Wrong keys that a message names.
_MAX_NAMED = 8
_WHOLE = re.compile(r"\d{1,18}")
_COPIED = (
    *("temperature", "top_p", "top_k", "min_p", "seed", "stop_token_ids", "min_tokens", "ignore_eos"),
    *("include_stop_str_in_output", "skip_special_tokens"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
)


@dataclasses.dataclass(frozen=True)
class SamplingPlan:
    """How one prompt of a request is answered.

    Attributes:
      params: The engine's parameters.
      num_copies: How often each completion is returned: more than once if all `n` would be the same.
      must_fit: Whether the requested output must fit in the context.
      max_tokens_name: The client's name for `max_tokens`.
      form: What the answer must match; None for anything.
    """

    params: SamplingParams
    num_copies: int
    must_fit: bool
    max_tokens_name: str
    form: WantedForm | None

    @property
    def n(self) -> int:
        """Completions of the prompt."""
        return self.params.n * self.num_copies


async def plan_sampling(
    service: Service,
    request: SamplingFields,
    *,
    max_tokens: int | None,
    max_tokens_name: str = "max_tokens",
    default_max_tokens: int | None,
    logprobs: int | None,
) -> SamplingPlan:
    """Reads the sampling fields.

    Args:
      service: Has the model and the limits.
      request: The request; a field that is None takes the model's default.
      max_tokens: Requested tokens; None if not given.
      max_tokens_name: The field that gave them.
      default_max_tokens: Tokens if not given; None for what is left of the context.
      logprobs: Likeliest tokens to return at each step; None for none.

    Raises:
      ApiError: 400, for a value that is not allowed.
    """
    llm, config = service.llm, service.config
    # More would need another program, compiled while others wait.
    _check_fields(request, max_stop_ids=NUM_STOP_IDS - len(llm.eos_ids))
    n = 1 if request.n is None else request.n
    if not 1 <= n <= config.max_n:
        raise bad_request(f"n is {n}; a whole number from 1 to {config.max_n} is needed", "n")
    values: dict[str, object] = {"max_tokens": default_max_tokens}
    if config.generation_config == "auto":
        values |= llm.sampling_defaults
    values |= {name: value for name in _COPIED if (value := getattr(request, name)) is not None}
    if max_tokens is not None:
        values["max_tokens"] = max_tokens
    form = await service.call(read_form, request) if may_have_form(request) else None
    values |= {"stop": _read_stop(request), "logprobs": logprobs}
    values["structured_outputs"] = None if form is None else form.params
    values["logit_bias"] = _read_bias(request.logit_bias, llm.config.text.vocab_size)
    temperature = values.get("temperature", 1.0)
    is_greedy = isinstance(temperature, int | float) and temperature < GREEDY_TEMPERATURE
    try:
        params = SamplingParams(n=1 if is_greedy else n, **values)  # type: ignore[arg-type]
    except ValueError as error:
        names = type(request).model_fields
        found = refused(error, list(names))
        if found.param == "max_tokens":
            found.param, found.message = max_tokens_name, found.message.replace("max_tokens", max_tokens_name, 1)
        raise found from None
    return SamplingPlan(params, n if is_greedy else 1, max_tokens is not None, max_tokens_name, form)


def check_logprobs(name: str, value: int | None) -> int | None:
    """A number of likeliest tokens. Raises ApiError 400 if it is out of range."""
    if value is not None and not 0 <= value <= MAX_LOGPROBS:
        raise bad_request(f"{name} is {value}; a whole number from 0 to {MAX_LOGPROBS} is needed", name)
    return value


def _check_fields(request: SamplingFields, *, max_stop_ids: int) -> None:
    n = 1 if request.n is None else request.n
    if request.best_of is not None and request.best_of != n:
        raise bad_request(
            f"best_of is {request.best_of}; only n, which is {n}, is possible: all completions are returned", "best_of"
        )
    if request.use_beam_search:
        raise bad_request("use_beam_search is true; it is not supported: sample with n instead", "use_beam_search")
    if request.seed is not None and not _SEEDS[0] <= request.seed <= _SEEDS[1]:
        raise bad_request(f"seed is {request.seed}; a whole number of 64 bits is needed", "seed")
    if request.stop_token_ids is not None and len(request.stop_token_ids) > max_stop_ids:
        raise bad_request(
            f"stop_token_ids has {len(request.stop_token_ids)} ids; at most {max_stop_ids} are allowed",
            "stop_token_ids",
        )
    if request.stream_options is not None and not request.stream:
        raise bad_request("stream_options is given without stream; set stream to true", "stream_options")


def _read_stop(request: SamplingFields) -> tuple[str, ...]:
    stop = request.stop
    stops = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > MAX_STOPS:
        raise bad_request(f"stop has {len(stops)} strings; at most {MAX_STOPS} are allowed", "stop")
    for text in stops:
        if not 1 <= len(text) <= MAX_STOP_LENGTH:
            raise bad_request(
                f"stop has a string of {len(text)} characters; 1 to {MAX_STOP_LENGTH} are allowed", "stop"
            )
    return stops


def _read_bias(bias: Mapping[str, float] | None, vocab_size: int) -> dict[int, float] | None:
    if not bias:
        return None
    wrong = [key for key in bias if not _WHOLE.fullmatch(key) or int(key) >= vocab_size]
    if wrong:
        shown = ", ".join(repr(key[:24]) for key in wrong[:_MAX_NAMED])
        more = f" and {len(wrong) - _MAX_NAMED} more" if len(wrong) > _MAX_NAMED else ""
        raise bad_request(
            f"logit_bias has keys {shown}{more}; token ids are needed, from 0 to {vocab_size - 1} "
            f"(the vocabulary has {vocab_size})",
            "logit_bias",
        )
    return {int(key): value for key, value in bias.items()}
