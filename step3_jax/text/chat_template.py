"""The checkpoint's chat template: renders messages to a prompt, as text or, safely, as token ids.

Templates come with a checkpoint and run in Jinja's sandbox. User text must not forge a turn or an
image, so `encode_chat` marks it before rendering, and control tokens between the marks stay text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from step3_jax.stored_file import TEMPLATE_FOLDERS, read_json_object, read_text
from step3_jax.text.message import Message, MessageGuard, collect_images, normalise_messages
from step3_jax.text.tokenizer import Tokenizer, token_name

# Messages and their images are part of this module's interface.
__all__ = ["ChatTemplate", "Message", "collect_images"]

TEMPLATE_FILE = "chat_template.jinja"
_TEMPLATE_JSONS = ("chat_template.json", "tokenizer_config.json")
_DEFAULT, _TOOL_USE = "default", "tool_use"

# What a template expression can raise on messages that it was not written for.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class _StoredTemplate(NamedTuple):
    """Jinja source, and its name in messages."""

    text: str
    source: str


class ChatTemplate:
    """A chat template, compiled on first use. Safe to share between threads.

    The environment is the same as in transformers, so that templates of any checkpoint run.
    """

    def __init__(self, text: str, *, variables: Mapping[str, object] | None = None) -> None:
        """Takes a template.

        Args:
          text: Jinja source.
          variables: Values for every rendering, such as `bos_token`.
        """
        self._stored: dict[str, _StoredTemplate] | None = {_DEFAULT: _StoredTemplate(text, "The chat template")}
        self._folder = Path()
        self._variables = dict(variables or {})
        self._compiled: dict[str, jinja2.Template] = {}

    @classmethod
    def load(cls, folder: str | Path) -> ChatTemplate:
        """Finds a checkpoint's template. It is read when first rendered: a model can also serve without chats.

        The first that exists: `chat_template.jinja`, with further ones in `additional_chat_templates/`; `chat_template`
        in `chat_template.json`, as in the release; `chat_template` in `tokenizer_config.json`. Of several named ones,
        "tool_use" is used if there are tools, else "default".

        Args:
          folder: Folder of the checkpoint.

        Returns:
          The template. It gets all special tokens of `tokenizer_config.json` by their keys.

        Raises:
          ValueError: If there is none.
        """
        template = cls.find(folder)
        if template is None:
            raise ValueError(
                f"{folder} has no chat template: looked for {TEMPLATE_FILE} and the key chat_template in "
                f"{' and '.join(_TEMPLATE_JSONS)}. Give the prompt as plain text instead."
            )
        return template

    @classmethod
    def find(cls, folder: str | Path) -> ChatTemplate | None:
        """Like `load`, but None for a checkpoint without a template."""
        folder = Path(folder)
        has_file = (folder / TEMPLATE_FILE).exists() or any(_further_files(folder))
        stored = (read_json_object(folder / name).get("chat_template") for name in _TEMPLATE_JSONS)
        if not has_file and all(value is None for value in stored):
            return None
        template = cls("", variables=_special_tokens(folder))
        template._stored, template._folder = None, folder
        return template

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
        **template_kwargs: object,
    ) -> str:
        """The prompt as text.

        Encoding this text turns every control token in it into one, including those that a user typed: use
        `encode_chat` for untrusted messages.

        Args:
          messages: Each with a `role` and `content`: text, None, or a list of texts and of items of the types in
            OpenAI's APIs and vLLM: text, input_text, image, image_url, input_image, image_pil. The arguments
            of an assistant's `tool_calls` are objects or their JSON text. Other keys are passed to the template.
          tools: JSON schemas of functions the model may call.
          add_generation_prompt: Whether the prompt ends with the start of the assistant's turn.
          **template_kwargs: Further variables of the template.

        Returns:
          The text.

        Raises:
          ValueError: If a message does not have this form, or the template refuses it.
        """
        return self._render(normalise_messages(messages), tools, add_generation_prompt, template_kwargs)

    def encode_chat(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        check_rendered: Callable[[str], None] | None = None,
        **template_kwargs: object,
    ) -> list[int]:
        """The prompt as token ids, in which control tokens come only from the template.

        Control tokens typed in user, system or tool messages, in tool calls or in schemas stay text. Assistant
        messages may hold those of reasoning and of tool calls, but none that make turns or images.
        Without typed control tokens the ids are those of the rendered text.

        Args:
          tokenizer: The checkpoint's tokenizer.
          messages: As in `render`.
          tools: As in `render`.
          add_generation_prompt: As in `render`.
          continue_final_message: Whether the prompt ends with the text of the last message, an assistant's, which the
            model continues. Then there is no generation prompt.
          check_rendered: Called with the rendered text before it is encoded; may raise.
          **template_kwargs: As in `render`.

        Returns:
          The ids, with one `<im_patch>` for each image (see `images.expand_image_tokens`).

        Raises:
          ValueError: As `render`; if the template drops an image; or if it alters messages with typed
            control tokens so that these cannot be distinguished from its own.
        """
        clean = normalise_messages(messages)
        add_generation_prompt &= not continue_final_message
        rendered = self._render(clean, tools, add_generation_prompt, template_kwargs)
        if check_rendered is not None:
            check_rendered(rendered)
        opening, closing, end = _free_marks(rendered)
        if continue_final_message:
            clean[-1] = _with_end(clean[-1], end)
            rendered = _cut(self._render(clean, tools, add_generation_prompt, template_kwargs), end)
        guard = MessageGuard(tokenizer, opening, closing)
        marked_messages = [guard.mark_message(message) for message in clean]
        marked_tools = None if tools is None else [guard.map_strings(tool, guard.mark_control) for tool in tools]
        marked = self._render(marked_messages, marked_tools, add_generation_prompt, template_kwargs)
        if continue_final_message:
            marked = _cut(marked, end)
        if marked.replace(opening, "").replace(closing, "") == rendered:
            ids = tokenizer.encode_guarded(marked, opening, closing)
        else:
            # The template inspects the contents, so the marks are lost. The text may be encoded as a whole
            # only if all control tokens in it come from the template.
            outside = re.sub(f"{opening}[^{closing}]*{closing}", opening, marked)
            trusted, present = ([match[2] for match in tokenizer.find_control(text)] for text in (outside, rendered))
            if trusted != present:
                raise ValueError(
                    "A message holds control tokens as text, and this chat template changes messages so that "
                    "they cannot be distinguished from its own. Remove them from the message."
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
        variables = {"documents": None, **self._variables, **template_kwargs}
        variables |= {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        template = self._choose(has_tools=tools is not None)
        try:
            return template.render(variables)
        except _TEMPLATE_ERRORS as error:
            raise ValueError(f"The chat template refuses these messages: {error}") from error

    def _choose(self, *, has_tools: bool) -> jinja2.Template:
        if self._stored is None:
            self._stored = _read_templates(self._folder)
        name = _TOOL_USE if has_tools and _TOOL_USE in self._stored else _DEFAULT
        if name not in self._stored:
            raise ValueError(
                f"{self._folder}: of the chat templates {', '.join(sorted(self._stored))} none is named {_DEFAULT!r}"
            )
        if name not in self._compiled:
            self._compiled[name] = _compile(self._stored[name])
        return self._compiled[name]


def _compile(stored: _StoredTemplate) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationMark, loopcontrols], keep_trailing_newline=False
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(stored.text)
    except (jinja2.TemplateError, RecursionError) as error:
        raise ValueError(f"{stored.source} cannot be compiled: {error}") from error


class _GenerationMark(jinja2.ext.Extension):
    """The block `{% generation %}`, which marks training text in transformers: here just its contents."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # Variables set inside stay local, as in transformers.
        return jinja2.nodes.Scope(body, lineno=line)


def _read_templates(folder: Path) -> dict[str, _StoredTemplate]:
    """All templates of a checkpoint by name, from the first place that has any."""
    files = {_DEFAULT: folder / TEMPLATE_FILE} if (folder / TEMPLATE_FILE).exists() else {}
    files |= {path.stem: path for path in _further_files(folder) if path.stem not in files}
    if files:
        return {name: _StoredTemplate(read_text(path), str(path)) for name, path in files.items()}
    for name in _TEMPLATE_JSONS:
        path = folder / name
        stored = read_json_object(path).get("chat_template")
        if isinstance(stored, list):
            stored = {
                item["name"]: item.get("template") for item in stored if isinstance(item, dict) and "name" in item
            }
        if isinstance(stored, str):
            stored = {_DEFAULT: stored}
        if stored is None:
            continue
        if not isinstance(stored, dict) or not all(isinstance(text, str) for text in stored.values()):
            raise ValueError(f"{path}: chat_template must be text or named templates.")
        return {str(title): _StoredTemplate(text, f"chat_template of {path}") for title, text in stored.items()}
    raise ValueError(f"{folder} has no chat template any more.")


def _further_files(folder: Path) -> list[Path]:
    return sorted(path for name in TEMPLATE_FOLDERS for path in (folder / name).glob("*.jinja"))


def _special_tokens(folder: Path) -> dict[str, object]:
    """Names of the special tokens by their keys, such as `bos_token`, from the current file and the older one."""
    found: dict[str, object] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        stored = read_json_object(folder / name)
        further = stored.get("extra_special_tokens")
        # Models name additional tokens there, such as `image_token`.
        stored = {**(further if isinstance(further, dict) else {}), **stored}
        # Settings such as add_bos_token have the same ending, but are not names.
        found |= {
            key: text for key in stored if key.endswith("_token") and (text := token_name(stored[key])) is not None
        }
        several = stored.get("additional_special_tokens")
        if isinstance(several, list):
            found["additional_special_tokens"] = [text for text in map(token_name, several) if text is not None]
    return found


def _with_end(message: Message, end: str) -> dict[str, object]:
    """An assistant's message with a mark after its text."""
    content = message["content"]
    if message["role"] != "assistant" or not isinstance(content, str) or not content:
        raise ValueError("To be continued, the last message must be an assistant's, with text as its content.")
    return {**message, "content": content.rstrip() + end}


def _cut(rendered: str, end: str) -> str:
    """The text before the mark."""
    start, found, _ = rendered.rpartition(end)
    if not found:
        raise ValueError("The chat template leaves out the last message, so it cannot be continued.")
    return start


def _free_marks(text: str) -> tuple[str, str, str]:
    """Three private-use characters that do not occur in the text."""
    free = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in text)
    try:
        return next(free), next(free), next(free)
    except StopIteration:
        raise ValueError("The messages use every private-use character from U+F0000; remove some.") from None


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML and all non-ASCII characters; the model was trained on neither.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
