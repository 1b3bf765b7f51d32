"""The output of /v1/responses: items of reasoning, text and calls, and the events that build them."""

from __future__ import annotations

import uuid

from step3_jax.server.protocol.chat import Delta, DeltaToolCall

Event = dict[str, object]

# Items with growing text: type of the item, of its part, and the names of its events.
_KINDS = {
    "reasoning": ("reasoning", "reasoning_text", "response.reasoning_text"),
    "content": ("message", "output_text", "response.output_text"),
}
_PREFIXES = {"reasoning": "rs", "message": "msg", "function_call": "fc"}


class ItemWriter:
    """Builds the output of one response; one item grows at a time.

    Attributes:
      items: The complete ones.
    """

    def __init__(self) -> None:
        self.items: list[dict[str, object]] = []
        self._kind: str | None = None
        self._id = ""
        self._text: list[str] = []
        self._call: dict[str, str] = {}

    def add(self, delta: Delta) -> list[Event]:
        """Takes new output; returns its stream events."""
        events: list[Event] = []
        for kind, text in (("reasoning", delta.reasoning), ("content", delta.content)):
            if text:
                events += self._add_text(kind, text)
        for call in delta.tool_calls or ():
            events += self._add_call(call)
        return events

    def finish(self) -> list[Event]:
        """Ends the growing item, if there is one."""
        if self._kind is None:
            return []
        kind, self._kind = self._kind, None
        item = self._describe(kind, is_whole=True)
        events: list[Event] = []
        if kind == "call":
            events.append(
                {
                    "type": "response.function_call_arguments.done",
                    **self._place(),
                    "name": self._call["name"],
                    "arguments": "".join(self._text),
                }
            )
        else:
            _, part, name = _KINDS[kind]
            text = "".join(self._text)
            place = self._place() | {"content_index": 0}
            events.append({"type": f"{name}.done", **place, "text": text, **_logprobs(kind)})
            events.append({"type": "response.content_part.done", **place, "part": _part(part, text)})
        events.append({"type": "response.output_item.done", "output_index": len(self.items), "item": item})
        self.items.append(item)
        return events

    def _add_text(self, kind: str, text: str) -> list[Event]:
        _, part, name = _KINDS[kind]
        events: list[Event] = []
        if self._kind != kind:
            events = self._start(kind)
            empty = _part(part, "")
            events.append({"type": "response.content_part.added", **self._place(), "content_index": 0, "part": empty})
        self._text.append(text)
        return [
            *events,
            {"type": f"{name}.delta", **self._place(), "content_index": 0, "delta": text, **_logprobs(kind)},
        ]

    def _add_call(self, call: DeltaToolCall) -> list[Event]:
        events: list[Event] = []
        if call.id is not None:
            events = self._start("call", {"call_id": call.id, "name": call.function.name or ""})
        if not call.function.arguments:
            return events
        self._text.append(call.function.arguments)
        delta = {"type": "response.function_call_arguments.delta", **self._place(), "delta": call.function.arguments}
        return [*events, delta]

    def _start(self, kind: str, call: dict[str, str] | None = None) -> list[Event]:
        """Ends the previous item, and starts one."""
        events = self.finish()
        self._kind, self._text = kind, []
        self._call = call or {}
        self._id = f"{_PREFIXES[_item_type(kind)]}_{uuid.uuid4().hex}"
        item = self._describe(kind, is_whole=False)
        return [*events, {"type": "response.output_item.added", "output_index": len(self.items), "item": item}]

    def _describe(self, kind: str, *, is_whole: bool) -> dict[str, object]:
        text = "".join(self._text)
        status = "completed" if is_whole else "in_progress"
        item: dict[str, object] = {"id": self._id, "type": _item_type(kind), "status": status}
        if kind == "call":
            return item | self._call | {"arguments": text}
        content = [_part(_KINDS[kind][1], text)] if is_whole else []
        if kind == "reasoning":
            item["summary"] = []
        else:
            item["role"] = "assistant"
        return item | {"content": content}

    def _place(self) -> dict[str, object]:
        return {"item_id": self._id, "output_index": len(self.items)}


def _item_type(kind: str) -> str:
    return "function_call" if kind == "call" else _KINDS[kind][0]


def _logprobs(kind: str) -> dict[str, object]:
    """Fields that clients expect for text, and for nothing else."""
    return {"logprobs": []} if kind == "content" else {}


def _part(kind: str, text: str) -> dict[str, object]:
    part: dict[str, object] = {"type": kind, "text": text}
    return part | {"annotations": [], "logprobs": []} if kind == "output_text" else part
