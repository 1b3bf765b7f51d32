"""The checkpoint's chat template: messages to a prompt, as text or, safely, as token ids.

Templates come with a checkpoint and run in Jinja's sandbox. What a user wrote must not forge a turn or an
image, so `encode_chat` marks such text before rendering, and control tokens between the marks stay text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from step3_jax.stored_file import read_json_object
from step3_jax.text.message import Message, MessageGuard, collect_images, normalise_messages
from step3_jax.text.tokenizer import Tokenizer, token_name

# Messages and their images are part of this module's interface.
__all__ = ["ChatTemplate", "Message", "collect_images"]

# What an expression of a template can raise on messages that it was not written for.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class ChatTemplate:
    """A compiled chat template. Safe to share between threads."""

    def __init__(self, text: str, *, variables: Mapping[str, str] | None = None) -> None:
        """Compiles a template.

        Args:
          text: Jinja source.
          variables: Values every rendering gets, such as `bos_token`.

        Raises:
          ValueError: If the source is no valid template.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols], keep_trailing_newline=False
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(text)
        except jinja2.TemplateError as error:
            raise ValueError(f"The chat template cannot be compiled: {error}") from error
        self._variables = dict(variables or {})

    @classmethod
    def load(cls, folder: str | Path) -> ChatTemplate:
        """Reads a checkpoint's template.

        The first that exists: `chat_template.jinja`; `chat_template` in `chat_template.json`, as in the
        release; `chat_template` in `tokenizer_config.json`, where of several named ones "default" is taken.

        Args:
          folder: Folder of the checkpoint.

        Returns:
          The template. `bos_token` and `eos_token` of `tokenizer_config.json` are given to it.

        Raises:
          ValueError: If there is none, or it is not valid.
        """
        folder = Path(folder)
        stored = read_json_object(folder / "tokenizer_config.json")
        names = {key: token_name(stored.get(key)) for key in ("bos_token", "eos_token")}
        variables = {key: name for key, name in names.items() if name is not None}
        path = folder / "chat_template.jinja"
        if path.exists():
            return cls(path.read_text(encoding="utf-8"), variables=variables)
        for name in ("chat_template.json", "tokenizer_config.json"):
            text = _default_template(read_json_object(folder / name).get("chat_template"))
            if text is not None:
                return cls(text, variables=variables)
        raise ValueError(
            f"{folder} has no chat template: looked for chat_template.jinja and the key chat_template in "
            "chat_template.json and tokenizer_config.json. Give the prompt as plain text instead."
        )

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
        **template_kwargs: object,
    ) -> str:
        """The prompt as text.

        Encoding this text turns every control token in it into one, those that a user typed too: use
        `encode_chat` for messages of others.

        Args:
          messages: Each with a `role` and `content`: text, None, or a list of texts and of items of the types that
            OpenAI's interfaces and vLLM have: text, input_text, image, image_url, input_image, image_pil. The arguments
            of an assistant's `tool_calls` are objects or their JSON text. Other keys are the template's business.
          tools: JSON schemas of functions the model may call.
          add_generation_prompt: Whether the prompt ends with the begin of the assistant's turn.
          **template_kwargs: Further variables of the template.

        Returns:
          The text.

        Raises:
          ValueError: If a message is not of this form, or the template refuses it.
        """
        return self._render(normalise_messages(messages), tools, add_generation_prompt, template_kwargs)

    def encode_chat(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
        **template_kwargs: object,
    ) -> list[int]:
        """The prompt as token ids, in which control tokens come from the template alone.

        Control tokens typed in user, system or tool messages, in tool calls or in schemas stay text. What the
        assistant said may hold those of reasoning and of tool calls, but none that make turns or images.
        Without typed control tokens the ids are those of the rendered text.

        Args:
          tokenizer: The checkpoint's tokenizer.
          messages: As in `render`.
          tools: As in `render`.
          add_generation_prompt: As in `render`.
          **template_kwargs: As in `render`.

        Returns:
          The ids, with one `<im_patch>` for each image (see `images.expand_image_tokens`).

        Raises:
          ValueError: As `render`; if the template leaves out an image; or if it alters messages with typed
            control tokens so that these cannot be told from its own.
        """
        clean = normalise_messages(messages)
        rendered = self._render(clean, tools, add_generation_prompt, template_kwargs)
        opening, closing = _free_marks(rendered)
        guard = MessageGuard(tokenizer, opening, closing)
        marked_messages = [guard.mark_message(message) for message in clean]
        marked_tools = None if tools is None else [guard.map_strings(tool, guard.mark_control) for tool in tools]
        marked = self._render(marked_messages, marked_tools, add_generation_prompt, template_kwargs)
        if marked.replace(opening, "").replace(closing, "") == rendered:
            ids = tokenizer.encode_guarded(marked, opening, closing)
        else:
            # The template looks into the contents, so the marks are lost. The text may be encoded as a whole
            # only if all control tokens in it are the template's.
            outside = re.sub(f"{opening}[^{closing}]*{closing}", opening, marked)
            trusted, present = ([match[2] for match in tokenizer.find_control(text)] for text in (outside, rendered))
            if trusted != present:
                raise ValueError(
                    "A message holds control tokens as text, and this chat template changes messages so that "
                    "they cannot be told from its own. Remove them from the message."
                )
            ids = tokenizer.encode(rendered)
        num_images = len(collect_images(messages))
        num_places = ids.count(tokenizer.control_tokens.get("<im_patch>", -1))
        if num_places != num_images:
            raise ValueError(f"The chat template makes {num_places} image place(s) for {num_images} image(s).")
        return ids

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[object] | None,
        add_generation_prompt: bool,
        template_kwargs: Mapping[str, object],
    ) -> str:
        variables = {**self._variables, **template_kwargs}
        variables |= {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(variables)
        except _TEMPLATE_ERRORS as error:
            raise ValueError(f"The chat template refuses these messages: {error}") from error


def _free_marks(text: str) -> tuple[str, str]:
    """Two characters for private use that the text does not hold."""
    free = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in text)
    try:
        return next(free), next(free)
    except StopIteration:
        raise ValueError("The messages use every character for private use from U+F0000; remove some.") from None


def _default_template(stored: object) -> str | None:
    if stored is None or isinstance(stored, str):
        return stored
    if isinstance(stored, list):
        named = {item["name"]: item.get("template") for item in stored if isinstance(item, dict) and "name" in item}
        if isinstance(named.get("default"), str):
            return named["default"]
        raise ValueError(f"Of the chat templates {sorted(map(str, named))} none is named 'default'.")
    raise ValueError(f"chat_template must be text or a list of named templates, not {type(stored).__name__}.")


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML and everything beyond ASCII; the model was trained on neither.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
