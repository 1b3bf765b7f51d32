"""/v1/responses without memory: its requests and responses are chats in another form."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence

from pydantic import ValidationError

from step3_jax.engine.request import StreamPiece
from step3_jax.server.admission import Ticket
from step3_jax.server.chat import prepare_chat
from step3_jax.server.choice import ChoiceForm, ChoiceState
from step3_jax.server.error import ApiError, bad_request, describe_invalid
from step3_jax.server.exchange import Job
from step3_jax.server.generation import Generation
from step3_jax.server.protocol.chat import ChatCompletionRequest
from step3_jax.server.protocol.response import (
    FunctionCallItem,
    FunctionOutputItem,
    InputImage,
    InputMessage,
    InputPart,
    InputRefusal,
    ReasoningItem,
    ResponseObject,
    ResponseRequest,
    ToolName,
)
from step3_jax.server.response_item import ItemWriter
from step3_jax.server.service import Service

# Features that would need the server to store state.
_STATEFUL = ("previous_response_id", "conversation", "background")


async def plan_response(service: Service, request: ResponseRequest, ticket: Ticket) -> ResponseJob:
    """Interprets a request as a chat.

    Raises:
      ApiError: 400, 404 or 503.
    """
    for name in _STATEFUL:
        if getattr(request, name):
            raise bad_request(
                f"{name} is given; this server keeps nothing between requests: send the whole input", name
            )
    if request.truncation == "auto":
        raise bad_request("truncation is auto; only disabled is possible: send less input", "truncation")
    # It copies schemas, which may be large.
    chat = await service.call(to_chat, request)
    try:
        prepared = await prepare_chat(service, chat, ticket, prompt_name="input", max_tokens_name="max_output_tokens")
    except ApiError as error:
        # The chat API's names for the same fields.
        renamed = {"response_format": "text.format", "max_completion_tokens": "max_output_tokens", "messages": "input"}
        error.param = renamed.get(error.param or "", error.param)
        error.message = error.message.replace("response_format.json_schema.", "text.format.")
        raise
    return ResponseJob(prepared.generation, request, prepared.form, prepared.name)


def to_chat(request: ResponseRequest) -> ChatCompletionRequest:
    """The same as a chat. Raises ApiError 400 for anything that a chat cannot express."""
    messages: list[dict[str, object]] = []
    if request.instructions:
        messages.append({"role": "system", "content": request.instructions})
    if isinstance(request.input, str):
        messages.append({"role": "user", "content": request.input})
    else:
        messages += _read_items(request.input)
    values: dict[str, object] = {
        "model": request.model,
        "messages": messages,
        "max_completion_tokens": request.max_output_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "stream": request.stream,
        "parallel_tool_calls": request.parallel_tool_calls,
        "reasoning_effort": request.reasoning.effort if request.reasoning else None,
    }
    if request.tools:
        values["tools"] = [
            {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}
            for tool in request.tools
        ]
    choice = request.tool_choice
    values["tool_choice"] = (
        {"type": "function", "function": {"name": choice.name}} if isinstance(choice, ToolName) else choice
    )
    form = request.text.format if request.text else None
    if form is not None:
        schema = {"name": form.name, "schema": form.schema_}
        values["response_format"] = {
            "type": form.type,
            "json_schema": schema if form.type == "json_schema" else None,
        }
    if not messages:
        raise bad_request("input has no message; give one", "input")
    try:
        return ChatCompletionRequest.model_validate(values)
    except ValidationError as error:
        raise describe_invalid(error, values) from None


def _read_items(
    items: Sequence[InputMessage | FunctionCallItem | FunctionOutputItem | ReasoningItem],
) -> list[dict[str, object]]:
    """Messages from a list of items. Consecutive calls, and calls after an assistant message, become one message."""
    messages: list[dict[str, object]] = []
    reasoning: str | None = None
    for item in items:
        if isinstance(item, ReasoningItem):
            texts = [part.text or "" for part in (item.content or item.summary or ())]
            reasoning = "\n".join(texts) or None
            continue
        if isinstance(item, FunctionOutputItem):
            output = item.output if isinstance(item.output, str) else _read_parts(item.output)
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": output})
        elif isinstance(item, FunctionCallItem):
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None})
            calls = messages[-1].setdefault("tool_calls", [])
            function = {"name": item.name, "arguments": item.arguments}
            calls.append({"id": item.call_id, "type": "function", "function": function})  # type: ignore[attr-defined]
        else:
            content = item.content if isinstance(item.content, str) else _read_parts(item.content)
            messages.append({"role": item.role, "content": content})
        if reasoning is not None and messages[-1]["role"] == "assistant":
            messages[-1]["reasoning"] = reasoning
        reasoning = None
    return messages


def _read_parts(parts: Sequence[InputPart]) -> list[dict[str, object]]:
    read: list[dict[str, object]] = []
    for part in parts:
        if isinstance(part, InputImage):
            read.append({"type": "image_url", "image_url": {"url": part.image_url}})
        else:
            read.append({"type": "text", "text": part.refusal if isinstance(part, InputRefusal) else part.text})
    return read


class ResponseJob(Job):
    """A response in progress."""

    # Its last event marks itself as the last.
    end_mark = b""

    def __init__(self, generation: Generation, request: ResponseRequest, form: ChoiceForm, name: str) -> None:
        """Starts an empty response.

        Args:
          generation: The engine's part.
          request: The request.
          form: How text is split.
          name: The model's name.
        """
        super().__init__(generation, is_stream=bool(request.stream))
        self._request = request
        self._name = name
        self._params = generation.requests[0].params
        self._choice = ChoiceState(form)
        self._items = ItemWriter()
        self._id = f"resp_{uuid.uuid4().hex}"
        self._created_at = int(time.time())
        self._num_events = 0

    def start(self) -> list[bytes]:
        """The events of its start."""
        response = self._describe("in_progress")
        return [self._event({"type": f"response.{kind}", "response": response}) for kind in ("created", "in_progress")]

    def add(self, place: int, piece: StreamPiece) -> list[bytes]:
        """Takes new output."""
        events = [event for delta in self._choice.add(piece) for event in self._items.add(delta)]
        self.generation.num_reasoning_tokens = self._choice.num_reasoning_tokens
        if self._choice.finish_reason is not None:
            events += self._items.finish()
        return [self._event(event) for event in events] if self.is_stream else []

    def end(self) -> list[bytes]:
        """The whole response again."""
        status = self._status
        return [self._event({"type": f"response.{status}", "response": self._describe(status)})]

    def fail(self, error: ApiError) -> bytes:
        """The last events of a stream that failed."""
        detail = error.body().error
        said = {"code": detail.code, "message": detail.message, "param": detail.param}
        return self._event({"type": "error", "error": detail.model_dump(), **said})

    def answer(self) -> ResponseObject:
        """The whole response."""
        return ResponseObject.of(self._describe(self._status))

    @property
    def _status(self) -> str:
        return "incomplete" if self._choice.finish_reason == "length" else "completed"

    def _describe(self, status: str) -> dict[str, object]:
        request, usage = self._request, self.generation.usage()
        is_over = status != "in_progress"
        choice, form = request.tool_choice, request.text.format if request.text else None
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created_at,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": self._name,
            "output": self._items.items if is_over else [],
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": request.reasoning.effort if request.reasoning else None, "summary": None},
            "store": False,
            "temperature": self._params.temperature,
            "text": {"format": form.model_dump(by_alias=True, exclude_none=True) if form else {"type": "text"}},
            "tool_choice": choice.model_dump() if isinstance(choice, ToolName) else choice or "auto",
            "tools": [tool.model_dump() for tool in request.tools or ()],
            "top_p": self._params.top_p,
            "truncation": "disabled",
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.prompt_tokens_details.cached_tokens},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": usage.completion_tokens_details.reasoning_tokens},
                "total_tokens": usage.total_tokens,
            }
            if is_over
            else None,
        }

    def _event(self, event: dict[str, object]) -> bytes:
        numbered = {**event, "sequence_number": self._num_events}
        self._num_events += 1
        return f"event: {event['type']}\ndata: {json.dumps(numbered, ensure_ascii=False)}\n\n".encode()
