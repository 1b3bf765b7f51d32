"""`step3 chat`: a conversation in the terminal, or over a pipe with one question a line."""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import sys

from step3_jax.cli.display import Display, default_show_reasoning, write_note
from step3_jax.cli.engine import add_engine, load_llm, print_config, read_engine
from step3_jax.cli.message import check_images, starts_thinking, system_messages, user_message
from step3_jax.cli.option import add_model, add_sampling, find_model, read_sampling
from step3_jax.engine.llm import LLM
from step3_jax.sampling.params import SamplingParams

# Line editing and history for input(); not on every system.
with contextlib.suppress(ImportError):
    import readline  # noqa: F401

HELP = "/image FILE shows a picture with the next question, /reset begins anew, /quit leaves"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="a system message at the begin")
    add_sampling(parser)
    add_engine(parser, without=["seed"])
    parser.add_argument(
        "--reasoning",
        action=argparse.BooleanOptionalAction,
        help="show what comes before </think>, on stderr (default: only on a terminal)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Talks until the input ends.

    A mistake in one turn is told and forgotten, so that the conversation goes on; over a pipe, where nobody can
    answer it, the exit code is 2 in the end.
    """
    if print_config(arguments):
        return 0
    choice = read_engine(arguments)
    params = read_sampling(arguments)
    folder = find_model(arguments)
    llm = load_llm(choice, folder)
    show_reasoning = default_show_reasoning() if arguments.reasoning is None else arguments.reasoning
    conversation = Conversation(llm, folder, params, system=arguments.system, show_reasoning=show_reasoning)
    is_interactive = sys.stdin.isatty()
    if is_interactive:
        write_note(f"{folder.name}: {HELP}")
    has_failed = False
    while True:
        try:
            line = input("> " if is_interactive else "").strip()
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
        self, llm: LLM, folder: pathlib.Path, params: SamplingParams, *, system: str | None, show_reasoning: bool
    ) -> None:
        """Begins a conversation.

        Args:
          llm: The model.
          folder: Its folder, for the chat template.
          params: How answers are sampled.
          system: A system message.
          show_reasoning: Whether reasoning is shown.
        """
        self._llm, self._folder, self._params = llm, folder, params
        self._show_reasoning = show_reasoning
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
            images = [str(pathlib.Path(rest.strip()).expanduser())]
            check_images(images)
            self._images += images
        elif command == "/reset":
            self._messages, self._images = list(self._begin), []
        elif command == "/help":
            write_note(HELP)
        elif command.startswith("/"):
            raise ValueError(f"unknown command {command}: {HELP}")
        else:
            self._answer(line)

    def _answer(self, question: str) -> None:
        # A picture that the engine refuses must not come back with the next question.
        images, self._images = self._images, []
        messages = [*self._messages, user_message(question, images)]
        display = Display(starts_thinking=starts_thinking(self._folder, messages), show_reasoning=self._show_reasoning)
        # Interrupted, the answer ends where it is, and the conversation goes on from there.
        with contextlib.suppress(KeyboardInterrupt):
            for piece in self._llm.chat(messages, self._params, stream=True):
                display.push(piece.text)
        display.finish()
        # Reasoning is not part of the history: the template would drop it too.
        self._messages = [*messages, {"role": "assistant", "content": display.answer}]
