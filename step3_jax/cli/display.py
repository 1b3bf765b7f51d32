"""What a reader at the terminal sees: the answer on stdout, everything about it on stderr."""

from __future__ import annotations

import sys

from step3_jax.text.reasoning import ReasoningSplitter

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
        print(flush=True)

    def _show(self, reasoning: str, answer: str) -> None:
        if reasoning:
            self._reasoning.append(reasoning)
            if self._show_reasoning:
                _write_dim(reasoning)
        if answer:
            if self._reasoning and not self._answer and self._show_reasoning:
                _write_dim("\n")
            self._answer.append(answer)
            print(answer, end="", flush=True)


def default_show_reasoning() -> bool:
    """Reasoning is for a person who watches, not for a log."""
    return sys.stderr.isatty()


def write_note(text: str) -> None:
    """Writes a line about the output, dimmed on a terminal."""
    _write_dim(text + "\n")


def _write_dim(text: str) -> None:
    if sys.stderr.isatty():
        text = f"{_DIM}{text}{_PLAIN}"
    sys.stderr.write(text)
    sys.stderr.flush()
