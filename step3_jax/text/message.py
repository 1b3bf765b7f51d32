"""Chat messages: their form, their images, and marks around what others wrote in them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from step3_jax.text.image_input import ImageSource
from step3_jax.text.tokenizer import Tokenizer

Message = Mapping[str, object]

_IMAGE_KEYS = ("image", "path", "url")
_IMAGE_ROLES = ("user", "tool")
_ROLE = re.compile(r"[a-z][a-z_]*")


def normalise_messages(messages: Sequence[Message]) -> list[dict[str, object]]:
    """Checks messages.

    Args:
      messages: As in `ChatTemplate.render`.

    Returns:
      Copies with a `content` each, in which every image is {"type": "image"}.

    Raises:
      ValueError: If a message is not of the right form; its number and what is allowed are named.
    """
    if isinstance(messages, (str, Mapping)) or not messages:
        raise ValueError("Messages must be a list of at least one {'role': ..., 'content': ...}.")
    clean = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(f"Message {number} is {type(message).__name__}; it must be an object with a role.")
        role, content = message.get("role"), message.get("content")
        # The role stands beside control tokens in the prompt, so it must not be free text.
        if not isinstance(role, str) or not _ROLE.fullmatch(role):
            raise ValueError(f"Message {number} has role {role!r}; give a name such as system, user or assistant.")
        if isinstance(content, (list, tuple)):
            content = [_normalise_item(item, number) for item in content]
            # Templates may put other roles elsewhere, and then images would change places.
            if role not in _IMAGE_ROLES and {"type": "image"} in content:
                raise ValueError(
                    f"Message {number} of role {role} has an image; only {' and '.join(_IMAGE_ROLES)} may."
                )
        elif content is not None and not isinstance(content, str):
            raise ValueError(f"Message {number} has content of type {type(content).__name__}; give text or a list.")
        elif content is None and role != "assistant":
            raise ValueError(f"Message {number} of role {role} has no content; give text or a list of items.")
        clean.append({**message, "content": content})
    return clean


def _normalise_item(item: object, number: int) -> dict[str, str]:
    item = item if isinstance(item, Mapping) else {}
    kind = item.get("type")
    if kind in ("image", "image_url"):
        return {"type": "image"}
    if kind != "text":
        raise ValueError(f"Message {number} has a content item of type {kind!r}; use text, image or image_url.")
    text = item.get("text")
    if not isinstance(text, str):
        raise ValueError(f"A text item of message {number} has no text; give {{'type': 'text', 'text': '...'}}.")
    return {"type": "text", "text": text}


def collect_images(messages: Sequence[Message]) -> list[ImageSource]:
    """The images of a conversation, in the order of their places in the prompt.

    Args:
      messages: As in `ChatTemplate.render`. An image item is {"type": "image", "image": source} (or the keys
        `path` or `url`), or {"type": "image_url", "image_url": {"url": source}}.

    Returns:
      Sources for `image_input.open_image`.

    Raises:
      ValueError: If a message is not of this form or an image has no source.
    """
    normalise_messages(messages)
    found: list[ImageSource] = []
    for number, message in enumerate(messages):
        content = message.get("content")
        for item in content if isinstance(content, (list, tuple)) else []:
            if item["type"] == "text":
                continue
            if item["type"] == "image_url":
                nested = item.get("image_url")
                source = nested.get("url") if isinstance(nested, Mapping) else nested
            else:
                source = next((item[key] for key in _IMAGE_KEYS if item.get(key) is not None), None)
            if source is None:
                raise ValueError(
                    f"An image of message {number} has no source; give {{'type': 'image', 'image': ...}} or "
                    "{'type': 'image_url', 'image_url': {'url': ...}}."
                )
            found.append(source)
    return found


class MessageGuard:
    """Puts marks around untrusted text of messages."""

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
        """The same value with `mark` applied to all its strings but the types of content items."""
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
        # As a whole, so that two contents cannot make a control token where they meet. Blanks stay outside,
        # as templates strip them.
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
        for start, end, inner in found:
            pieces += [text[position:start], self._opening, inner, self._closing]
            position = end
        return "".join([*pieces, text[position:]])


def _is_spoken(name: str) -> bool:
    """Whether a control token is one that an assistant's text holds by right."""
    return name in ("<think>", "</think>") or "tool" in name or "steptml" in name
