"""What goes into the engine and what comes out of it."""

from __future__ import annotations

import dataclasses
from typing import Protocol

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
      cache_salt: Prompts with different salts share nothing of the prefix cache.
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
      request_id: Its name, unique among the requests of an engine at one time.
      prompt: What is continued.
      params: How it is sampled.
      seed: Of its random numbers.
      steps_per_call: Most decode steps between two of its outputs.
      must_fit: Whether `max_tokens` must fit into the context; otherwise it is an upper bound.
    """

    request_id: str
    prompt: Prompt
    params: SamplingParams
    seed: int
    steps_per_call: int = 32
    must_fit: bool = False


class ContextLengthError(ValueError):
    """The prompt and the output asked for are longer than the context."""


# Values of `SequenceOutput.finish` besides "stop" and "length".
ABORTED, FAILED = "aborted", "failed"


@dataclasses.dataclass(frozen=True)
class SequenceOutput:
    """What one sequence got since its last output.

    Attributes:
      request_id: Of the request.
      index: The sequence's number among the request's.
      token_ids: New tokens, the one that ended it included.
      finish: "" while it goes on; "stop" (its last token ended it), "length", "aborted" or "failed".
      logprobs: Of the new tokens, if asked for.
      error: Why it failed.
      num_cached_tokens: Prompt tokens that came from the prefix cache.
      time_s: When the tokens were there: seconds since the request arrived, without compiling.
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
    """Where a request's outputs go: a `queue.SimpleQueue`, or whatever has its `put`. It must not block or raise."""

    def put(self, output: SequenceOutput) -> None: ...


@dataclasses.dataclass(frozen=True)
class Logprob:
    """A token's log-probability at one step.

    Attributes:
      logprob: Natural logarithm, of the model's own distribution (before temperature, bias and penalties).
      rank: The token's place among all, from 1.
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
      text: The text, without the stop string unless that was asked for; "" without a tokenizer.
      token_ids: What was sampled, without the token that ended it.
      finish_reason: "stop" (an end token or a stop string), "length", or "error" (see `RequestOutput.error`).
      stop_reason: The stop string, or the id from `stop_token_ids`; None for the model's own end or "length".
      logprobs: For each of `token_ids` the chosen token and the likeliest ones; None if not asked for.
      cumulative_logprob: Sum over `token_ids`; None if not asked for.
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
      num_prompt_tokens: Image places counted.
      num_generated_tokens: Of all its completions, end tokens counted.
      time_to_first_token_s: From the call to the first token, without compiling.
      decode_s: From the first token to the last one of the longest completion, without compiling.
      compile_s: Time the call spent compiling up to this request's end.
    """

    num_prompt_tokens: int
    num_generated_tokens: int
    time_to_first_token_s: float
    decode_s: float
    compile_s: float

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens a second after the first, all completions together; 0 if there was one token."""
        return self.num_generated_tokens / self.decode_s if self.decode_s > 0 else 0.0


@dataclasses.dataclass(frozen=True)
class RequestOutput:
    """All completions of one prompt.

    Attributes:
      request_id: The request's name.
      index: The prompt's place in the call.
      prompt: The prompt as text, None if it was given as token ids.
      prompt_token_ids: What the model saw, image places expanded.
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
    """New output of one completion. The pieces of a completion, put together, are its `CompletionOutput`.

    Attributes:
      index: The prompt's place in the call.
      completion: The completion's number among the `n` of its prompt.
      text: New text, complete characters only.
      token_ids: New tokens.
      finish_reason: None until the last piece.
      stop_reason: As in `CompletionOutput`.
      logprobs: Of the new tokens, if asked for.
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
