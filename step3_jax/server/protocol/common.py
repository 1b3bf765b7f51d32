"""What requests of several endpoints have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from step3_jax.sampling.batch import NUM_BIASES
from step3_jax.server.stream import format_event

NonEmpty = Annotated[str, Field(min_length=1)]
Item = TypeVar("Item")
# A list of a request. Only its first wrong item is reported, and to describe half a million of them would take seconds.
Items = Annotated[list[Item], Field(fail_fast=True)]


def _limit_entries(value: object) -> object:
    if isinstance(value, dict) and len(value) > NUM_BIASES:
        raise PydanticCustomError("too_long", f"it has {len(value)} entries, at most {NUM_BIASES} are allowed")
    return value


# An object of a request with names of the client's choice, few enough that all wrong values can be described.
Entries = Annotated[dict[str, Item], BeforeValidator(_limit_entries)]


class Body(BaseModel):
    """Part of a request. Types are strict, "5" is not a number; unknown fields are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", populate_by_name=True, protected_namespaces=())


class Answer(BaseModel):
    """Part of a response; unset fields are left out."""

    model_config = ConfigDict(populate_by_name=True, protected_namespaces=())

    @classmethod
    def of(cls, *parts: Mapping[str, object], **values: object) -> Self:
        """Creates one from values that are checked; only given fields are sent."""
        return cls.model_validate({name: value for part in (*parts, values) for name, value in part.items()})

    def to_json(self) -> bytes:
        """The JSON text to send."""
        return self.model_dump_json(exclude_unset=True, by_alias=True).encode()

    def to_event(self) -> bytes:
        """The same as an event of a stream."""
        return format_event(self.to_json())


class StreamOptions(Body):
    """Options of a stream's usage.

    Attributes:
      include_usage: Whether a last chunk has the usage.
      continuous_usage_stats: Whether every chunk has the usage so far.
    """

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class StructuredOutputs(Body):
    """What the answer must match: exactly one of these.

    Attributes:
      json_schema: A JSON schema, as an object or its text.
      regex: A regular expression.
      choice: Texts.
      grammar: A grammar, Lark's or GBNF.
      json_object: Whether any JSON object is accepted.
    """

    json_schema: dict[str, object] | str | bool | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Items[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class JsonSchema(Body):
    """A named schema; `strict` has no effect, as the schema is always enforced."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, object] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """The format of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class SamplingFields(Body):
    """How tokens are chosen and when the answer ends. Ranges are those of `SamplingParams`."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: int | None = None
    best_of: int | None = None
    use_beam_search: bool | None = None
    seed: int | None = None
    stop: str | Items[str] | None = None
    stop_token_ids: Items[int] | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Entries[float] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    cache_salt: NonEmpty | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    user: str | None = None


class PromptTokensDetails(Answer):
    """The prompt's tokens that were in the prefix cache."""

    cached_tokens: int


class CompletionTokensDetails(Answer):
    """The generated tokens that are reasoning."""

    reasoning_tokens: int


class Usage(Answer):
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


FinishReason = Literal["stop", "length", "tool_calls"]
