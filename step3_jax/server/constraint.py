"""What the answer must match: turns a request's fields into the engine's structured outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from pydantic import BaseModel

from step3_jax.sampling.structured import StructuredOutputsParams
from step3_jax.server.error import ApiError, bad_request
from step3_jax.server.message import read_tools
from step3_jax.server.protocol.chat import ChatCompletionRequest, NamedToolChoice
from step3_jax.server.protocol.common import ResponseFormat, SamplingFields
from step3_jax.text.tool_grammar import tool_grammar

_OWN_NAME = "structured_outputs"
# Fields that would change the answer, so that ignoring them like other unknown ones would silently give another one.
_REFUSED = {
    **{
        f"guided_{kind}": f'is not known; give structured_outputs: {{"{kind}": ...}}'
        for kind in ("json", "regex", "choice", "grammar")
    },
    "allowed_token_ids": "is not supported; give structured_outputs, or logit_bias for single tokens",
    "bad_words": "is not supported; give structured_outputs, or logit_bias of -100 for single tokens",
    "chat_template": "is not supported, as a template is code: leave it out, and the model's own is used",
    "echo": "is not known here; put the message in front of its continuation yourself",
    "logits_processors": "is not supported; give structured_outputs, or logit_bias for single tokens",
    "prompt_logprobs": "is not supported; give echo and logprobs to /v1/completions",
    "thinking_token_budget": "is not supported; max_tokens counts reasoning and answer together",
    "truncate_prompt_tokens": "is not supported, as it drops part of the prompt: send less",
}


def refuse_unheeded(body: Mapping[str, object], model: type[BaseModel]) -> None:
    """Raises ApiError 400 for unknown fields that must not be ignored. false and an empty list are as good as none."""
    for name, text in _REFUSED.items():
        value = body.get(name)
        if value is None or value is False or value == [] or name in model.model_fields:
            continue
        raise bad_request(f"{name} {text}", name)


@dataclasses.dataclass(frozen=True)
class WantedForm:
    """What the answer, after its reasoning, must match.

    Attributes:
      params: The engine's parameters.
      param: The request's field that says so.
      source: The client's name for what `params` call `structured_outputs.json`; empty if it is the same.
    """

    params: StructuredOutputsParams
    param: str
    source: str = ""

    def refuse(self, error: ValueError) -> ApiError | None:
        """The answer to an engine error about the constraint; None for another error."""
        return _refuse(error, self.param, self.source) if str(error).startswith(_OWN_NAME) else None


def may_have_form(request: SamplingFields) -> bool:
    """Whether there is anything for `read_form`."""
    has_tools = isinstance(request, ChatCompletionRequest) and (request.tools or request.tool_choice)
    return bool(request.structured_outputs or request.response_format or has_tools)


def read_form(request: SamplingFields) -> WantedForm | None:
    """What the answer must match; None for anything. Reading a schema may take long: not for the event loop.

    Args:
      request: Its `structured_outputs`, `response_format`, `tool_choice` and `parallel_tool_calls` say so.

    Raises:
      ApiError: 400, for fields that are malformed, cannot be enforced, or conflict.
    """
    found: list[WantedForm] = []
    if request.structured_outputs is not None:
        given = request.structured_outputs
        # Without copying a schema, which may be large.
        values = {field.alias or name: getattr(given, name) for name, field in type(given).model_fields.items()}
        found.append(_make(_OWN_NAME, lambda: StructuredOutputsParams(**values)))
    if request.response_format is not None and request.response_format.type != "text":
        found.append(_read_format(request.response_format))
    if isinstance(request, ChatCompletionRequest):
        calls = _read_calls(request, is_constrained=bool(found))
        if calls is not None:
            found.append(calls)
    if len(found) > 1:
        names = " and ".join(one.param for one in found)
        raise bad_request(f"{names} both say what the answer must be; give one of them", found[0].param)
    return found[0] if found else None


def _read_format(form: ResponseFormat) -> WantedForm:
    name, source = "response_format", "response_format.json_schema.schema"
    if form.type == "json_object":
        return WantedForm(StructuredOutputsParams(json_object=True), name)
    schema = None if form.json_schema is None else form.json_schema.schema_
    if schema is None:
        raise bad_request(f"{source} is missing; it is required", name, "missing_required_parameter")
    return _make(name, lambda: StructuredOutputsParams(json=schema), source)


def _read_calls(request: ChatCompletionRequest, *, is_constrained: bool) -> WantedForm | None:
    choice, tools = request.tool_choice, read_tools(request.tools) or []
    if isinstance(choice, NamedToolChoice):
        # The named one, once, unless more are requested.
        name, is_several = choice.function.name, request.parallel_tool_calls is True
        return _make("tool_choice", lambda: _calls(tools, choice=name, is_parallel=is_several))
    is_parallel = request.parallel_tool_calls is not False
    if choice == "required":
        return _make("tool_choice", lambda: _calls(tools, is_parallel=is_parallel))
    if tools and choice != "none" and not is_parallel and not is_constrained:
        return _make("parallel_tool_calls", lambda: _calls(tools, is_parallel=False, is_free=True))
    return None


def _calls(
    tools: Sequence[Mapping[str, object]], *, choice: str | None = None, is_parallel: bool, is_free: bool = False
) -> StructuredOutputsParams:
    return StructuredOutputsParams(grammar=tool_grammar(tools, choice=choice, is_parallel=is_parallel, is_free=is_free))


def _make(param: str, make: Callable[[], StructuredOutputsParams], source: str = "") -> WantedForm:
    try:
        return WantedForm(make(), param, source)
    except ValueError as error:
        raise _refuse(error, param, source) from None


def _refuse(error: ValueError, param: str, source: str) -> ApiError:
    text = " ".join(str(error).split())
    return bad_request(text.replace(f"{_OWN_NAME}.json", source) if source else text, param, "invalid_schema")
