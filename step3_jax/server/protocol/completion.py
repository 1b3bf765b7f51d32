"""Requests and responses of /v1/completions."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from step3_jax.server.protocol.common import Answer, FinishReason, Items, SamplingFields, Usage

# The most prompts that one request may have; each counts in the queue.
MAX_PROMPTS = 256

TextPrompts = Annotated[Items[str], Field(min_length=1, max_length=MAX_PROMPTS)]
TokenPrompt = Annotated[Items[int], Field(min_length=1)]
TokenPrompts = Annotated[Items[TokenPrompt], Field(min_length=1, max_length=MAX_PROMPTS)]


class CompletionRequest(SamplingFields):
    """The body of a request. Null counts as not given."""

    prompt: str | TextPrompts | TokenPrompt | TokenPrompts
    echo: bool | None = None
    add_special_tokens: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None


class CompletionLogprobs(Answer):
    """For each token: its text, its log-probability, the likeliest ones by text, and where it starts in the text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Answer):
    """One of `n` completions of one of the prompts: those of the first prompt come first."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class Completion(Answer):
    """The body of a whole response, and, with only new text, one event of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
