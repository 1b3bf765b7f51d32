"""A conversation in the terminal: its commands, its images and its loop, whatever answers."""

from __future__ import annotations

import abc
import contextlib
import pathlib
import shlex
import sys
import urllib.parse
from collections.abc import Sequence

from step3_jax.cli.display import Display, write_note
from step3_jax.cli.message import check_images, system_messages, user_message
from step3_jax.cli.process import interruptible
from step3_jax.client import ServiceError
from step3_jax.text.tool_call import Tool

# Line editing and history for input(); not on every system.
with contextlib.suppress(ImportError):
    import readline  # noqa: F401

HELP = "/image FILE shows an image with the next question, /reset starts over, /quit leaves"


class Talk(abc.ABC):
    """The conversation so far, and the images waiting for the next question."""

    def __init__(self, *, system: str | None, show_reasoning: bool, tools: Sequence[Tool] = ()) -> None:
        """Starts a conversation.

        Args:
          system: A system message.
          show_reasoning: Whether reasoning is shown.
          tools: Tools that the model may call. Calls are shown and remembered; nothing runs them.
        """
        self._show_reasoning = show_reasoning
        self._tools = list(tools)
        self._begin = system_messages(system)
        self._messages = list(self._begin)
        self._images: list[str] = []

    @property
    def messages(self) -> list[dict[str, object]]:
        """The conversation so far."""
        return list(self._messages)

    def take(self, line: str) -> None:
        """Handles a line: a command that starts with /, or a question.

        Raises:
          ValueError: For an unknown command, an image that cannot be opened, or a question that is refused; the
            conversation stays as before.
          ServiceError: If a service does not answer.
        """
        command, _, rest = line.partition(" ")
        if not line:
            return
        if command == "/image":
            self._check_vision()
            path = find_pasted_path(rest)
            check_images([path])
            self._images.append(path)
        elif command == "/reset":
            self._messages, self._images = list(self._begin), []
        elif command == "/help":
            write_note(HELP)
        elif command.startswith("/"):
            raise ValueError(f"unknown command {command}: {HELP}")
        else:
            # A refused image must not come back with the next question.
            images, self._images = self._images, []
            self._answer([*self._messages, user_message(line, images)])

    @abc.abstractmethod
    def _check_vision(self) -> None:
        """Raises ValueError if the model is known to take no images."""

    @abc.abstractmethod
    def _answer(self, messages: list[dict[str, object]]) -> None:
        """Shows the answer to messages, the last of which is the question, and stores both."""

    def _remember(self, messages: list[dict[str, object]], display: Display) -> None:
        # Reasoning is not part of the history: the template would drop it too.
        turn: dict[str, object] = {"role": "assistant", "content": display.answer}
        if display.tool_calls:
            turn["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in display.tool_calls
            ]
        self._messages = [*messages, turn]


def run_talk(talk: Talk, name: str) -> int:
    """Talks until the input ends.

    An error in one turn is reported and then ignored, so that the conversation continues; over a pipe, where no user
    can react, the exit code reflects it.

    Args:
      talk: The conversation.
      name: The model's name, for display.

    Returns:
      The exit code.
    """
    is_interactive = sys.stdin.isatty()
    if is_interactive:
        write_note(f"{name}: {HELP}")
    code = 0
    while True:
        try:
            # Some shells put a byte order mark before piped text.
            with interruptible():  # An exit in the middle of it would leave the terminal in line editing's mode.
                line = input("> " if is_interactive else "").removeprefix("\ufeff").strip()
        except EOFError:
            break
        if line == "/quit":
            break
        try:
            talk.take(line)
        except (ValueError, ServiceError) as error:
            code = 1 if isinstance(error, ServiceError) else 2
            print(f"step3: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 0 if is_interactive else code


def find_pasted_path(text: str) -> str:
    """A path as terminals paste or drop it: in quotes, with blanks escaped, or as a file:// address.

    Args:
      text: What follows /image.

    Returns:
      The path. Text that names an existing file is never changed.
    """
    text = text.strip()
    plain = pathlib.Path(text).expanduser()
    if text and plain.exists():
        return str(plain)
    with contextlib.suppress(ValueError):  # An apostrophe in a name is not a quotation mark.
        words = shlex.split(text)
        if len(words) == 1:
            text = words[0]
    if text.lower().startswith("file://"):
        text = urllib.parse.unquote(urllib.parse.urlsplit(text).path)
    return str(pathlib.Path(text).expanduser())
