"""What a reader at the terminal sees: the answer on stdout, everything about it on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

from step3_jax.cli.progress import show_progress
from step3_jax.engine.request import StreamPiece
from step3_jax.text.reasoning import ReasoningSplitter

ANSWERING = "reading the prompt (the first of its size compiles programs)"

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


class Display:
    """Shows an output as it comes: reasoning dimmed on stderr, the answer on stdout."""

    def __init__(self, *, starts_thinking: bool, show_reasoning: bool) -> None:
        """Begins one output.

        Args:
          starts_thinking: Whether the prompt ended inside the reasoning.
          show_reasoning: Whether the reasoning is shown at all.
        """
        self._splitter = ReasoningSplitter(starts_thinking=starts_thinking)
        self._show_reasoning = show_reasoning
        self._reasoning: list[str] = []
        self._answer: list[str] = []

    @property
    def reasoning(self) -> str:
        """The reasoning so far, without blanks around it."""
        return "".join(self._reasoning)

    @property
    def answer(self) -> str:
        """The answer so far, without blanks around it."""
        return "".join(self._answer)

    def push(self, text: str) -> None:
        """Shows a piece of the output."""
        self._show(*self._splitter.push(text))

    def finish(self) -> None:
        """Shows what was held back, and ends the line."""
        self._show(*self._splitter.finish())
        if self._reasoning and not self._answer and self._show_reasoning:
            _write_dim("\n")
        self._print()

    @staticmethod
    def _print(text: str = "", end: str = "\n") -> None:
        if is_first_process():
            print(text, end=end, flush=True)

    def _show(self, reasoning: str, answer: str) -> None:
        if reasoning:
            self._reasoning.append(reasoning)
            if self._show_reasoning:
                _write_dim(reasoning)
        if answer:
            if self._reasoning and not self._answer and self._show_reasoning:
                _write_dim("\n")
            self._answer.append(answer)
            self._print(answer, end="")


def show_until_first(pieces: Iterator[StreamPiece]) -> Iterator[StreamPiece]:
    """The same pieces; a terminal is told what is waited for until the first one comes."""
    with show_progress(ANSWERING):
        first = next(pieces, None)
    if first is not None:
        yield first
        yield from pieces


def default_show_reasoning() -> bool:
    """Reasoning is for a person who watches, not for a log."""
    return sys.stderr.isatty()


def write_note(text: str) -> None:
    """Writes a line about the output, dimmed on a terminal."""
    _write_dim(text + "\n")


def is_first_process() -> bool:
    """Whether this process is the one of several whose answers are shown: all of them have the same."""
    return os.environ.get("STEP3_PROCESS_ID", "0") in ("", "0")


def _write_dim(text: str) -> None:
    if not is_first_process():
        return
    if sys.stderr.isatty():
        text = f"{_DIM}{text}{_PLAIN}"
    sys.stderr.write(text)
    sys.stderr.flush()
