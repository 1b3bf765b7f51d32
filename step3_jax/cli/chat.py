"""`step3 chat`: a conversation in the terminal, or over a pipe with one question a line."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import pathlib
import shlex
import sys
import urllib.parse
from collections.abc import Sequence

from step3_jax.cli.choice import find_model, read_sampling
from step3_jax.cli.display import Display, default_show_reasoning, show_until_first, write_note
from step3_jax.cli.engine import load_llm, print_config, read_engine
from step3_jax.cli.message import (
    check_images,
    read_tools,
    starts_thinking,
    stop_in_answer,
    system_messages,
    user_message,
)
from step3_jax.cli.precheck import check_before_loading
from step3_jax.cli.process import interruptible
from step3_jax.cli.progress import show_progress
from step3_jax.engine.llm import LLM
from step3_jax.sampling.params import SamplingParams
from step3_jax.text.tool_call import Tool

# Line editing and history for input(); not on every system.
with contextlib.suppress(ImportError):
    import readline  # noqa: F401

HELP = "/image FILE shows an image with the next question, /reset begins anew, /quit leaves"
# Of the context, what an answer gets at least before older turns are dropped for it.
_ANSWER_SHARE = 4


def run(arguments: argparse.Namespace) -> int:
    """Talks until the input ends.

    A mistake in one turn is told and forgotten, so that the conversation goes on; over a pipe, where nobody can
    answer it, the exit code is 2 in the end.
    """
    if print_config(arguments):
        return 0
    choice = read_engine(arguments)
    params = read_sampling(arguments)
    tools = read_tools(arguments.tools)
    folder = find_model(arguments)
    check_before_loading(folder, max_model_len=choice.config.max_model_len)
    with show_progress(f"loading {folder}"):
        llm = load_llm(choice, folder)
    show_reasoning = default_show_reasoning() if arguments.reasoning is None else arguments.reasoning
    conversation = Conversation(
        llm, folder, params, system=arguments.system, show_reasoning=show_reasoning, tools=tools
    )
    is_interactive = sys.stdin.isatty()
    if is_interactive:
        write_note(f"{folder.name}: {HELP}")
    has_failed = False
    while True:
        try:
            # Some shells put a byte order mark in front of what they pipe.
            with interruptible():  # An exit in the middle of it would leave the terminal as line editing has set it.
                line = input("> " if is_interactive else "").removeprefix("\ufeff").strip()
        except EOFError:
            break
        if line == "/quit":
            break
        try:
            conversation.take(line)
        except ValueError as error:
            has_failed = True
            print(f"step3: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2 if has_failed and not is_interactive else 0


class Conversation:
    """What was said so far, and the pictures that wait for the next question."""

    def __init__(
        self,
        llm: LLM,
        folder: pathlib.Path,
        params: SamplingParams,
        *,
        system: str | None,
        show_reasoning: bool,
        tools: Sequence[Tool] = (),
    ) -> None:
        """Begins a conversation.

        Args:
          llm: The model.
          folder: Its folder, for the chat template.
          params: How answers are sampled.
          system: A system message.
          show_reasoning: Whether reasoning is shown.
          tools: Tools that the model may call. Calls are shown and remembered; nothing runs them.
        """
        self._llm, self._folder, self._params = llm, folder, params
        self._show_reasoning = show_reasoning
        self._tools = list(tools)
        self._begin = system_messages(system)
        self._messages = list(self._begin)
        self._images: list[str] = []

    @property
    def messages(self) -> list[dict[str, object]]:
        """What was said so far."""
        return list(self._messages)

    def take(self, line: str) -> None:
        """Does what a line says: a command that begins with /, or a question.

        Raises:
          ValueError: For an unknown command, a picture that cannot be opened, or a question the engine refuses;
            what was said before stays.
        """
        command, _, rest = line.partition(" ")
        if not line:
            return
        if command == "/image":
            self._add_image(rest)
        elif command == "/reset":
            self._messages, self._images = list(self._begin), []
        elif command == "/help":
            write_note(HELP)
        elif command.startswith("/"):
            raise ValueError(f"unknown command {command}: {HELP}")
        else:
            self._answer(line)

    def _add_image(self, text: str) -> None:
        if self._llm.config.vision is None:
            raise ValueError("this model has no vision tower, so it cannot be shown an image")
        path = find_pasted_path(text)
        check_images([path])
        self._images.append(path)

    def _answer(self, question: str) -> None:
        # An image that the engine refuses must not come back with the next question.
        images, self._images = self._images, []
        messages, params = self._fit([*self._messages, user_message(question, images)])
        is_thinking = starts_thinking(self._folder, messages)
        display = Display(starts_thinking=is_thinking, show_reasoning=self._show_reasoning, tools=self._tools)
        params, finish_reason = stop_in_answer(params, starts_thinking=is_thinking), None
        # Interrupted, the answer ends where it is, and the conversation goes on from there.
        with contextlib.suppress(KeyboardInterrupt), interruptible():
            for piece in show_until_first(self._llm.chat(messages, params, tools=self._tools or None, stream=True)):
                display.push(piece.text)
                finish_reason = piece.finish_reason
        display.finish()
        if finish_reason == "length":
            limit = "--max-tokens" if params.max_tokens == self._params.max_tokens else "the end of the context"
            place = "" if display.answer or display.tool_calls else " inside the reasoning"
            write_note(f"(cut off{place} by {limit})")
        # Reasoning is not part of the history: the template would drop it too.
        turn: dict[str, object] = {"role": "assistant", "content": display.answer}
        if display.tool_calls:
            turn["tool_calls"] = [{"name": call.name, "arguments": call.arguments} for call in display.tool_calls]
        self._messages = [*messages, turn]

    def _fit(self, messages: list[dict[str, object]]) -> tuple[list[dict[str, object]], SamplingParams]:
        """Drops the oldest turns until an answer has room, and shortens the answer to what is left."""
        limit, wanted = self._llm.max_model_len, self._params.max_tokens
        least = max(1, limit // _ANSWER_SHARE)
        if wanted is not None:
            least = min(least, wanted)
        # A turn is a question and its answer; the last question stays.
        first, last = len(self._begin), len(messages) - 1
        start = first
        room = self._room_after(messages)
        # A question that has no room even alone is the engine's to refuse.
        if room < least and self._room_after([*self._begin, messages[last]]) > 0:
            while room < least and start < last:
                start += 2
                room = self._room_after([*self._begin, *messages[start:]])
        if start > first:
            turns = "turn was" if start == first + 2 else f"{(start - first) // 2} turns were"
            write_note(f"(the conversation is full, {limit:,} tokens: the oldest {turns} left out; /reset begins anew)")
        params = self._params
        if room > 0 and (wanted is None or wanted > room):
            params = dataclasses.replace(params, max_tokens=room)
        return [*self._begin, *messages[start:]], params

    def _room_after(self, messages: list[dict[str, object]]) -> int:
        """Tokens of the context that a conversation leaves for the answer."""
        return self._llm.max_model_len - len(self._llm.prompts.from_chat(messages, tools=self._tools or None).token_ids)


def find_pasted_path(text: str) -> str:
    """A path as terminals paste or drop it: in quotes, with blanks escaped, or as a file:// address.

    Args:
      text: What stands after /image.

    Returns:
      The path. Text that names a file as it stands is never changed.
    """
    text = text.strip()
    plain = pathlib.Path(text).expanduser()
    if text and plain.exists():
        return str(plain)
    with contextlib.suppress(ValueError):  # An apostrophe in a name is no quotation.
        words = shlex.split(text)
        if len(words) == 1:
            text = words[0]
    if text.lower().startswith("file://"):
        text = urllib.parse.unquote(urllib.parse.urlsplit(text).path)
    return str(pathlib.Path(text).expanduser())
