"""Chat messages: their form, their images, and marks around untrusted text."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import cast

from step3_jax.text.image_input import ImageSource
from step3_jax.text.tokenizer import Tokenizer

Message = Mapping[str, object]

_IMAGE_ROLES = ("user", "tool")
_ROLE = re.compile(r"[a-z][a-z_]*")
# Types of content items in OpenAI's two APIs, vLLM and transformers.
_TEXT_KEYS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}
_IMAGE_TYPES = ("image", "image_url", "input_image", "image_pil")
_IMAGE_KEYS = ("image", "path", "url", "image_url", "image_pil")


@dataclasses.dataclass(frozen=True)
class _ImageItem:
    """An image of a content list; `source` is None if the item has none."""

    source: ImageSource | None


def normalise_messages(messages: Sequence[Message]) -> list[dict[str, object]]:
    """Checks messages and normalises them to the form that chat templates expect.

    Args:
      messages: As in `ChatTemplate.render`.

    Returns:
      Copies with a `content` each: text, None (only for the assistant), or a list of {"type": "text", "text": ...} and
      {"type": "image"}. The arguments of tool calls are objects; empty `tool_calls` are left out.

    Raises:
      ValueError: If a message is malformed; the message gives its number and what is allowed.
    """
    if isinstance(messages, (str, Mapping)) or not messages:
        raise ValueError("Messages must be a list of at least one {'role': ..., 'content': ...}.")
    clean = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(f"Message {number} is {type(message).__name__}; it must be an object with a role.")
        role = message.get("role")
        # The role is next to control tokens in the prompt, so it must not be free text.
        if not isinstance(role, str) or not _ROLE.fullmatch(role):
            raise ValueError(f"Message {number} has role {role!r}; give a name such as system, user or assistant.")
        copy = {**message, "content": _normalise_content(message, role, number)}
        if role == "assistant" and "tool_calls" in message:
            calls = _normalise_calls(message["tool_calls"], number)
            if calls:
                copy["tool_calls"] = calls
            else:
                del copy["tool_calls"]
        clean.append(copy)
    return clean


def _normalise_content(message: Message, role: str, number: int) -> object:
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        items = [_parse_item(item, number) for item in content]
        # Templates may move other roles, and then images would change places.
        if role not in _IMAGE_ROLES and any(isinstance(item, _ImageItem) for item in items):
            raise ValueError(f"Message {number} of role {role} has an image; only {' and '.join(_IMAGE_ROLES)} may.")
        return [
            {"type": "text", "text": item} if isinstance(item, str) else {"type": "image"}
            for item in items
            if item is not None
        ]
    if content is None:
        # A tool may return nothing, which clients write as null; a key that is missing elsewhere is a mistake.
        if "content" not in message and role not in ("assistant", "tool"):
            raise ValueError(f"Message {number} of role {role} has no content; give text or a list of items.")
        return None if role == "assistant" else ""
    if not isinstance(content, str):
        raise ValueError(f"Message {number} has content of type {type(content).__name__}; give text or a list.")
    return content


def _parse_item(item: object, number: int) -> str | _ImageItem | None:
    """Text or image of a content item; None for a null text."""
    if isinstance(item, str):
        return item
    if not isinstance(item, Mapping):
        raise ValueError(f"Message {number} has a content item that is {type(item).__name__}; give text or an object.")
    kind = item.get("type")
    if kind is None:
        # Clients omit the type where the key implies it.
        kind = next((key for key in ("text", *_IMAGE_KEYS) if key in item), None)
        kind = "image" if kind in _IMAGE_KEYS else kind
    if kind in _IMAGE_TYPES:
        return _ImageItem(_image_source(item))
    if not isinstance(kind, str) or kind not in _TEXT_KEYS:
        raise ValueError(
            f"Message {number} has a content item of type {kind!r}; use {', '.join((*_TEXT_KEYS, *_IMAGE_TYPES))}."
        )
    key = _TEXT_KEYS[kind]
    text = item.get(key)
    if text is None and key in item:
        return None
    if not isinstance(text, str):
        raise ValueError(f"A {kind} item of message {number} has no text; give {{'type': '{kind}', '{key}': '...'}}.")
    return text


def _image_source(item: Mapping[str, object]) -> ImageSource | None:
    for key in _IMAGE_KEYS:
        value = item.get(key)
        if isinstance(value, Mapping):
            value = value.get("url")
        if value is not None:
            # Its type is checked when the image is opened.
            return cast(ImageSource, value)
    encoded = item.get("base64")
    return f"data:;base64,{encoded}" if isinstance(encoded, str) else None


def _normalise_calls(calls: object, number: int) -> list[dict[str, object]]:
    """Tool calls with their arguments as objects: clients of OpenAI's API send them as JSON text."""
    if calls is None:
        return []
    if not isinstance(calls, (list, tuple)):
        raise ValueError(f"Message {number} has tool_calls of type {type(calls).__name__}; give a list of calls.")
    clean = []
    for call in calls:
        if not isinstance(call, Mapping) or call.get("type", "function") != "function":
            raise ValueError(
                f"Message {number} has a tool call that is not a function's; give {{'type': 'function', 'function': "
                "{'name': ..., 'arguments': {...}}}."
            )
        function = call.get("function", call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f"A tool call of message {number} has no function name; give {{'name': '...'}}.")
        where = f"The arguments of {function['name']!r} in message {number}"
        function = {**function, "arguments": _parse_arguments(function.get("arguments"), where)}
        clean.append({**call, "function": function} if "function" in call else function)
    return clean


def _parse_arguments(arguments: object, where: str) -> Mapping[str, object]:
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} are not valid JSON: {error}; give an object or its JSON text.") from None
    if arguments is None:
        return {}
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{where} are {type(arguments).__name__}; give an object or its JSON text.")
    return arguments


def collect_images(messages: Sequence[Message]) -> list[ImageSource]:
    """The images of a conversation, in the order of their places in the prompt.

    Args:
      messages: As in `ChatTemplate.render`. An image item is {"type": "image", "image": source} (or the keys `path`,
        `url` or `base64`), {"type": "image_url", "image_url": {"url": source}}, {"type": "input_image", "image_url":
        source} or {"type": "image_pil", "image_pil": image}.

    Returns:
      Sources for `image_input.open_image`.

    Raises:
      ValueError: If a message is malformed or an image has no source.
    """
    normalise_messages(messages)
    found: list[ImageSource] = []
    for number, message in enumerate(messages):
        content = message.get("content")
        for part in content if isinstance(content, (list, tuple)) else ():
            item = _parse_item(part, number)
            if not isinstance(item, _ImageItem):
                continue
            if item.source is None:
                raise ValueError(
                    f"An image of message {number} has no source; give {{'type': 'image', 'image': ...}} or "
                    "{'type': 'image_url', 'image_url': {'url': ...}}."
                )
            found.append(item.source)
    return found


def replace_images(messages: Sequence[Message], sources: Sequence[ImageSource]) -> list[dict[str, object]]:
    """The same messages with other sources for their images.

    Args:
      messages: Checked by `collect_images`.
      sources: One for each image, in the order of `collect_images`.

    Returns:
      Copies; other items are the same objects.
    """
    left = iter(sources)
    copies = []
    for number, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            content = [
                {"type": "image", "image": next(left)} if isinstance(_parse_item(item, number), _ImageItem) else item
                for item in content
            ]
            copies.append({**message, "content": content})
        else:
            copies.append(dict(message))
    return copies


class MessageGuard:
    """Puts marks around untrusted text in messages."""

    def __init__(self, tokenizer: Tokenizer, opening: str, closing: str) -> None:
        self._tokenizer = tokenizer
        self._opening, self._closing = opening, closing

    def mark_message(self, message: Message) -> dict[str, object]:
        """A copy of a checked message with marks."""
        is_assistant = message["role"] == "assistant"
        marked: dict[str, object] = {}
        for key, value in message.items():
            if key == "role":
                marked[key] = value
            elif not is_assistant:
                marked[key] = self.map_strings(value, self._mark_whole)
            elif key in ("content", "reasoning_content"):
                # Templates look for </think> here, and the model did write these tokens.
                marked[key] = self.map_strings(value, self._mark_unspoken)
            else:
                marked[key] = self.map_strings(value, self.mark_control)
        return marked

    def map_strings(self, value: object, mark: Callable[[str], str]) -> object:
        """The same value with `mark` applied to all its strings except the types of content items."""
        if isinstance(value, str):
            return mark(value)
        if isinstance(value, Mapping):
            return {
                self.mark_control(key) if isinstance(key, str) else key: (
                    item if key == "type" and item in ("text", "image") else self.map_strings(item, mark)
                )
                for key, item in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self.map_strings(item, mark) for item in value]
        return value

    def mark_control(self, text: str) -> str:
        """Marks each control token of a text."""
        return self._mark_found(text, self._tokenizer.find_control(text))

    def _mark_whole(self, text: str) -> str:
        # As a whole, so that two contents cannot form a control token where they meet. Whitespace stays outside,
        # as templates strip it.
        inner = text.strip()
        if not inner:
            return text
        start = len(text) - len(text.lstrip())
        return self._mark_found(text, [(start, start + len(inner), inner)])

    def _mark_unspoken(self, text: str) -> str:
        found = [match for match in self._tokenizer.find_control(text) if not _is_spoken(match[2])]
        return self._mark_found(text, found)

    def _mark_found(self, text: str, found: Sequence[tuple[int, int, str]]) -> str:
        pieces, position = [], 0
        for start, end, _ in found:
            pieces += [text[position:start], self._opening, text[start:end], self._closing]
            position = end
        return "".join([*pieces, text[position:]])


def _is_spoken(name: str) -> bool:
    """Whether a control token is legitimate in an assistant's text."""
    return name in ("<think>", "</think>") or "tool" in name or "steptml" in name
