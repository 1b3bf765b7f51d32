"""Requests and responses of /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from step3_jax.server.protocol.common import Answer, Body, FinishReason, Items, NonEmpty, SamplingFields, Usage


class TextPart(Body):
    """A text item of a content list."""

    type: Literal["text"]
    text: str


class RefusalPart(Body):
    """An assistant's refusal, in a history."""

    type: Literal["refusal"]
    refusal: str


class ImageUrl(Body):
    """Where an image is; `detail` has no effect."""

    url: NonEmpty
    detail: str | None = None


class ImagePart(Body):
    """An image item of a content list."""

    type: Literal["image_url"]
    image_url: ImageUrl | NonEmpty


ContentPart = Annotated[TextPart | RefusalPart | ImagePart, Field(discriminator="type")]


class CalledFunction(Body):
    """A function that an assistant called; arguments as JSON text or as an object."""

    name: NonEmpty
    arguments: str | dict[str, object] | None = None


class ToolCall(Body):
    """A call in a history."""

    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction


class ChatMessage(Body):
    """One message. Reasoning of earlier turns is accepted under both of its names; `reasoning` takes precedence."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Items[ContentPart] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: Items[ToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None


class FunctionDefinition(Body):
    """A function that the model may call."""

    name: NonEmpty
    description: str | None = None
    parameters: dict[str, object] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool; functions are the only kind."""

    type: Literal["function"] = "function"
    function: FunctionDefinition


class FunctionName(Body):
    """A function by its name."""

    name: NonEmpty


class NamedToolChoice(Body):
    """The function that must be called."""

    type: Literal["function"] = "function"
    function: FunctionName


class ChatFields(Body):
    """The fields that turn a conversation into a prompt."""

    messages: Annotated[Items[ChatMessage], Field(min_length=1)]
    tools: Items[Tool] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, object] | None = None


class ChatCompletionRequest(SamplingFields, ChatFields):
    """The body of a request. Null counts as not given."""

    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool | None = None


class TokenLogprob(Answer):
    """One of the likeliest tokens."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChosenLogprob(TokenLogprob):
    """The chosen token, and the likeliest ones."""

    top_logprobs: list[TokenLogprob]


class ChoiceLogprobs(Answer):
    """Log-probabilities of all tokens of a choice, including those of reasoning."""

    content: list[ChosenLogprob] | None


class MadeFunction(Answer):
    """A call's function; arguments are JSON text."""

    name: str | None = None
    arguments: str


class MadeToolCall(Answer):
    """A call in an answer."""

    id: str
    type: Literal["function"]
    function: MadeFunction


class AnswerMessage(Answer):
    """The answer. Reasoning appears under both of its names."""

    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[MadeToolCall] | None = None


class ChatChoice(Answer):
    """One of `n` answers."""

    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason
    stop_reason: int | str | None
    token_ids: list[int] | None = None


class ChatCompletion(Answer):
    """The body of a whole response."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None


class DeltaToolCall(Answer):
    """The new part of a call: id, type and name only in its first piece."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: MadeFunction


class Delta(Answer):
    """The new part of an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[DeltaToolCall] | None = None


class ChunkChoice(Answer):
    """The new part of one of `n` answers."""

    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatCompletionChunk(Answer):
    """One event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None
