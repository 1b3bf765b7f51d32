"""Requests and responses of /tokenize and /detokenize, in vLLM's form."""

from __future__ import annotations

from pydantic import Field

from step3_jax.server.protocol.chat import ChatMessage, Tool
from step3_jax.server.protocol.common import Answer, Body, Items


class TokenizeRequest(Body):
    """A text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    messages: Items[ChatMessage] | None = Field(default=None, min_length=1)
    tools: Items[Tool] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, object] | None = None


class TokenizeResponse(Answer):
    """Token ids."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(Body):
    """Token ids."""

    model: str | None = None
    tokens: Items[int]


class DetokenizeResponse(Answer):
    """A text."""

    prompt: str
