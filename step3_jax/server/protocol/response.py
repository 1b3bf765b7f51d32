"""Requests and responses of /v1/responses, as far as they need no memory between requests."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Discriminator, Field, JsonValue, Tag

from step3_jax.server.protocol.common import Answer, Body, Entries, Items, NonEmpty


class InputText(Body):
    """Text of an input message, or of an earlier assistant message."""

    type: Literal["input_text", "output_text", "text"]
    text: str


class InputImage(Body):
    """An image of an input message."""

    type: Literal["input_image"]
    image_url: NonEmpty
    detail: str | None = None


class InputRefusal(Body):
    """An earlier refusal by the assistant."""

    type: Literal["refusal"]
    refusal: str


InputPart = Annotated[InputText | InputImage | InputRefusal, Field(discriminator="type")]


class InputMessage(Body):
    """A message."""

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Items[InputPart]


class FunctionCallItem(Body):
    """An earlier call by the model."""

    type: Literal["function_call"]
    call_id: str | None = None
    name: NonEmpty
    arguments: str | None = None


class FunctionOutputItem(Body):
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: str | None = None
    output: str | Items[InputPart]


class ReasoningText(Body):
    """Text of earlier reasoning."""

    text: str | None = None


class ReasoningItem(Body):
    """Earlier reasoning; templates that show it get it with the message after it."""

    type: Literal["reasoning"]
    content: Items[ReasoningText] | None = None
    summary: Items[ReasoningText] | None = None


def _kind_of(item: object) -> str:
    """Messages may omit their type."""
    kind = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return "message" if kind is None else str(kind)


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_kind_of),
]


class ResponseTool(Body):
    """A function that the model may call."""

    type: Literal["function"]
    name: NonEmpty
    description: str | None = None
    parameters: dict[str, object] | None = None
    strict: bool | None = None


class ToolName(Body):
    """The function that must be called."""

    type: Literal["function"]
    name: NonEmpty


class TextFormat(Body):
    """The format of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, object] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextOptions(Body):
    """Options of the answer's text."""

    format: TextFormat | None = None


class ReasoningOptions(Body):
    """Options of the reasoning: effort none leaves it out."""

    effort: str | None = None


class ResponseRequest(Body):
    """The body of a request. Null counts as not given."""

    model: str | None = None
    input: str | Annotated[Items[InputItem], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    tools: Items[ResponseTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolName | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, object] | None = None
    background: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: Entries[str] | None = None
    user: str | None = None


class InputTokensDetails(Answer):
    """The input's tokens that were in the prefix cache."""

    cached_tokens: int


class OutputTokensDetails(Answer):
    """The output's tokens that are reasoning."""

    reasoning_tokens: int


class ResponseUsage(Answer):
    """Token counts of a response."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(Answer):
    """Why an output was cut off."""

    reason: Literal["max_output_tokens"]


class ResponseFailure(Answer):
    """Why a response failed."""

    code: str
    message: str


class ResponseEvent(Answer):
    """One event of a stream; its other fields depend on its type."""

    model_config = ConfigDict(extra="allow")

    type: str
    sequence_number: int


class ResponseObject(Answer):
    """The body of a whole response. Its output is a list of reasoning, message and function_call items."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[dict[str, JsonValue]]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: dict[str, JsonValue]
    store: Literal[False]
    temperature: float
    text: dict[str, JsonValue]
    tool_choice: str | dict[str, JsonValue]
    tools: list[dict[str, JsonValue]]
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
