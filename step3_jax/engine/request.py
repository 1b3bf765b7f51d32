"""The engine's inputs and outputs."""

from __future__ import annotations

import dataclasses
from typing import Protocol

from step3_jax.engine.constraint import Constraint
from step3_jax.sampling.params import SamplingParams
from step3_jax.sampling.sampler import StepLogprobs
from step3_jax.text.images import ProcessedImage


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt ready for the model.

    Attributes:
      token_ids: Ids with every image's places expanded.
      text: The prompt as text, if there is one.
      images: The images, in the order of their places.
      image_places: Where in `token_ids` image features go, in order; empty without images.
      cache_salt: Prompts with different salts share nothing in the prefix cache.
    """

    token_ids: tuple[int, ...]
    text: str | None = None
    images: tuple[ProcessedImage, ...] = ()
    image_places: tuple[int, ...] = ()
    cache_salt: str = ""


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt with its parameters.

    Attributes:
      request_id: Its name, unique among an engine's current requests.
      prompt: What is continued.
      params: How it is sampled.
      seed: Seed of its random numbers.
      steps_per_call: Most decode steps between two of its outputs.
      must_fit: Whether `max_tokens` must fit in the context; otherwise it is an upper bound.
      constraint: Enforces `params.structured_outputs`, see `engine.grammar`; None without them.
    """

    request_id: str
    prompt: Prompt
    params: SamplingParams
    seed: int
    steps_per_call: int = 32
    must_fit: bool = False
    constraint: Constraint | None = None

    @property
    def pause_id(self) -> int:
        """See `SamplingBatch.pause_ids`: the token after which the constraint starts."""
        mark = None if self.constraint is None else self.constraint.begins_after
        return -1 if mark is None else mark


class ContextLengthError(ValueError):
    """The prompt and the requested output are longer than the context."""


def check_request(request: Request, *, max_model_len: int, vocab_size: int) -> None:
    """Raises ValueError (ContextLengthError) if a request cannot be served; the message says what could be.

    Args:
      request: The request.
      max_model_len: Most tokens of prompt and output together.
      vocab_size: V.
    """
    prompt, params = request.prompt, request.params
    num_tokens, limit = len(prompt.token_ids), max_model_len
    if not num_tokens:
        raise ValueError("the prompt has no tokens; at least one is needed")
    outside = [token for token in prompt.token_ids if not 0 <= token < vocab_size]
    if outside:
        raise ValueError(f"the prompt has token ids {outside[:8]}; allowed: 0 to {vocab_size - 1}")
    if num_tokens - 1 in prompt.image_places:
        raise ValueError("the prompt ends with an image's place; at least one token is needed after it")
    num_output = max(1, params.min_tokens)
    if request.must_fit:
        num_output = params.max_tokens or num_output
    if num_tokens + num_output > limit:
        raise ContextLengthError(
            f"the prompt has {num_tokens} tokens and {num_output} more are asked for, together "
            f"{num_tokens + num_output}; at most max_model_len = {limit} are allowed: shorten the prompt, lower "
            f"{'max_tokens' if request.must_fit else 'min_tokens'}, or load with a larger max_model_len"
        )
    if params.structured_outputs is not None and request.constraint is None:
        raise ValueError(
            "the request asks for structured_outputs but has no constraint: make it with Engine.new_request"
        )


# Values of `SequenceOutput.finish` besides "stop" and "length".
ABORTED, FAILED = "aborted", "failed"


@dataclasses.dataclass(frozen=True)
class SequenceOutput:
    """What one sequence has generated since its last output.

    Attributes:
      request_id: The request's id.
      index: The sequence's number within the request.
      token_ids: New tokens, including the one that ended it.
      finish: "" while it goes on; "stop" (its last token ended it), "length", "aborted" or "failed".
      logprobs: Log-probabilities of the new tokens, if requested.
      error: Why it failed.
      num_cached_tokens: Prompt tokens that came from the prefix cache.
      time_s: When the tokens were ready: seconds since the request arrived, without compiling.
      compile_s: Seconds of compiling since then.
      admitted_s: When its request first got a slot, on `time.monotonic`; None if it never did.
    """

    request_id: str
    index: int
    token_ids: tuple[int, ...]
    finish: str = ""
    logprobs: StepLogprobs | None = None
    error: str = ""
    num_cached_tokens: int = 0
    time_s: float = 0.0
    compile_s: float = 0.0
    admitted_s: float | None = None


class OutputSink(Protocol):
    """Where a request's outputs go: a `queue.SimpleQueue`, or anything with its `put`. It must not block or raise."""

    def put(self, output: SequenceOutput) -> None: ...


@dataclasses.dataclass(frozen=True)
class Logprob:
    """A token's log-probability at one step.

    Attributes:
      logprob: Natural logarithm, of the model's own distribution (before temperature, bias and penalties).
      rank: The token's rank among all, from 1.
      decoded_token: Its text; None without a tokenizer.
    """

    logprob: float
    rank: int
    decoded_token: str | None


@dataclasses.dataclass(frozen=True)
class CompletionOutput:
    """One completion.

    Attributes:
      index: Its number among the `n` of its prompt.
      text: The text, without the stop string unless that was requested; "" without a tokenizer.
      token_ids: The sampled tokens, without the one that ended it.
      finish_reason: "stop" (an end token or a stop string), "length", or "error" (see `RequestOutput.error`).
      stop_reason: The stop string, or the id from `stop_token_ids`; None for the model's own end or "length".
      logprobs: For each of `token_ids`, the chosen token and the likeliest ones; None if not requested.
      cumulative_logprob: Sum over `token_ids`; None if not requested.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    stop_reason: int | str | None = None
    logprobs: tuple[dict[int, Logprob], ...] | None = None
    cumulative_logprob: float | None = None


@dataclasses.dataclass(frozen=True)
class RequestMetrics:
    """How one request went.

    Attributes:
      num_prompt_tokens: Tokens of the prompt, including image places.
      num_generated_tokens: Tokens of all its completions, including end tokens.
      time_to_first_token_s: From the call to the first token, without compiling.
      decode_s: From the first token to the last one of the longest completion, without compiling.
      compile_s: Time that the call spent compiling until this request ended.
    """

    num_prompt_tokens: int
    num_generated_tokens: int
    time_to_first_token_s: float
    decode_s: float
    compile_s: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second after the first, over all completions; 0 if there was only one token."""
        return self.num_generated_tokens / self.decode_s if self.decode_s > 0 else 0.0


@dataclasses.dataclass(frozen=True)
class RequestOutput:
    """All completions of one prompt.

    Attributes:
      request_id: The request's name.
      index: The prompt's index in the call.
      prompt: The prompt as text; None if it was given as token ids.
      prompt_token_ids: What the model saw, with image places expanded.
      outputs: `n` completions.
      metrics: Counts and times.
      num_cached_tokens: Prompt tokens whose keys and values came from the prefix cache.
      error: Why the prompt was not answered; None if it was.
    """

    request_id: str
    index: int
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    metrics: RequestMetrics
    num_cached_tokens: int = 0
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class StreamPiece:
    """New output of one completion. The pieces of a completion add up to its `CompletionOutput`.

    Attributes:
      index: The prompt's index in the call.
      completion: The completion's number among the `n` of its prompt.
      text: New text, only complete characters.
      token_ids: New tokens.
      finish_reason: None until the last piece.
      stop_reason: As in `CompletionOutput`.
      logprobs: Log-probabilities of the new tokens, if requested.
      request_id: The request's name.
      error: Why it failed, where `finish_reason` is "error".
    """

    index: int
    completion: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: tuple[dict[int, Logprob], ...] | None = None
    request_id: str = ""
    error: str | None = None
