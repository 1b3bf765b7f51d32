"""What the answer must match: from a request's fields to the engine's structured outputs."""

from __future__ import annotations

from collections.abc import Mapping

from step3_jax.server.error import bad_request
from step3_jax.server.protocol.chat import ChatCompletionRequest
from step3_jax.server.protocol.common import SamplingFields

_FORMER = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")


def refuse_former_names(body: Mapping[str, object]) -> None:
    """Raises ApiError 400 for names that would be ignored, so that an answer would match nothing without a word."""
    for name in _FORMER:
        if body.get(name) is not None:
            new = name.removeprefix("guided_")
            raise bad_request(f'{name} is not known; give structured_outputs: {{"{new}": ...}}', name)


def check_constraint(request: SamplingFields) -> None:
    """Raises ApiError 400 for a form of the answer that was asked for: none can be held to yet."""
    if request.structured_outputs is not None:
        raise bad_request("structured_outputs is given; it is not offered yet", "structured_outputs")
    if request.response_format is not None and request.response_format.type != "text":
        raise bad_request(
            f"response_format is {request.response_format.type}; text alone is offered yet", "response_format"
        )
    if isinstance(request, ChatCompletionRequest) and request.tool_choice not in (None, "auto", "none"):
        raise bad_request("tool_choice asks for a call; auto and none alone are offered yet", "tool_choice")
