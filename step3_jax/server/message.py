"""Turns a request's messages into the chat template's form.

A client's messages are copied field by field and never passed through: the Python API's messages may name files.
"""

from __future__ import annotations

from collections.abc import Sequence

from step3_jax.server.error import bad_request
from step3_jax.server.protocol.chat import ChatMessage, FunctionDefinition, ImagePart, RefusalPart, TextPart, Tool

# Template variables that clients must not set: a template is code, and the others have their own fields.
RESERVED = frozenset(
    (
        *("messages", "tools", "add_generation_prompt", "continue_final_message", "tokenizer", "chat_template"),
        *("self", "check_rendered", "bos_token", "eos_token"),
    )
)


def read_messages(messages: Sequence[ChatMessage]) -> list[dict[str, object]]:
    """Messages of a request in the form of `ChatTemplate.render`."""
    return [_read_message(message) for message in messages]


def has_images(messages: Sequence[ChatMessage]) -> bool:
    """Whether there is an image in any message."""
    return any(
        isinstance(part, ImagePart)
        for message in messages
        if isinstance(message.content, list)
        for part in message.content
    )


def read_tools(tools: Sequence[Tool] | None) -> list[dict[str, object]] | None:
    """Tools of a request as the template shows them; None without any."""
    if not tools:
        return None
    # Without copying schemas, which may be large.
    return [{"type": "function", "function": _read_function(tool.function)} for tool in tools]


def check_variables(variables: dict[str, object] | None) -> dict[str, object]:
    """Further variables of the template. Raises ApiError 400 for those that clients must not set."""
    wrong = sorted(RESERVED & set(variables or ()))
    if wrong:
        raise bad_request(
            f"chat_template_kwargs has {', '.join(wrong)}, which cannot be set there", "chat_template_kwargs"
        )
    return dict(variables or {})


def _read_function(function: FunctionDefinition) -> dict[str, object]:
    values = {"name": function.name, "description": function.description, "parameters": function.parameters}
    return {name: value for name, value in values.items() if value is not None}


def _read_message(message: ChatMessage) -> dict[str, object]:
    # Developer is what newer clients call system.
    role = "system" if message.role == "developer" else message.role
    read: dict[str, object] = {"role": role}
    if message.content is None or isinstance(message.content, str):
        if message.content is not None or "content" in message.model_fields_set:
            read["content"] = message.content
    else:
        read["content"] = [_read_part(part) for part in message.content]
    reasoning = message.reasoning if message.reasoning is not None else message.reasoning_content
    if role == "assistant" and reasoning is not None:
        read["reasoning_content"] = reasoning
    if role == "assistant" and message.tool_calls:
        read["tool_calls"] = [
            {
                "type": "function",
                "id": call.id or "",
                "function": {"name": call.function.name, "arguments": call.function.arguments},
            }
            for call in message.tool_calls
        ]
    for name in ("tool_call_id", "name"):
        if getattr(message, name) is not None:
            read[name] = getattr(message, name)
    return read


def _read_part(part: TextPart | RefusalPart | ImagePart) -> dict[str, object]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    if isinstance(part, RefusalPart):
        return {"type": "text", "text": part.refusal}
    url = part.image_url if isinstance(part.image_url, str) else part.image_url.url
    return {"type": "image_url", "image_url": {"url": url}}
