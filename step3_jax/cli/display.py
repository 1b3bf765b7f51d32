"""What a user sees in the terminal: the answer on stdout, everything about it on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

from step3_jax.cli.progress import show_progress
from step3_jax.text.output_parser import OutputDelta, OutputParser, join_deltas
from step3_jax.text.tool_call import Tool, ToolCall

ANSWERING = "reading the prompt (the first of its size compiles programs)"

_T = TypeVar("_T")

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
# A terminal gets line ends and tabs unchanged; other control characters become visible symbols.
_CONTROLS = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
_SYMBOLS = _CONTROLS | {0x7F: "\u2421"} | dict.fromkeys(range(0x80, 0xA0), "\ufffd")


class Display:
    """Shows an output as it arrives: reasoning dimmed on stderr, the answer on stdout, then tool calls one per line."""

    def __init__(self, *, starts_thinking: bool, show_reasoning: bool, tools: Sequence[Tool] = ()) -> None:
        """Starts one output.

        Args:
          starts_thinking: Whether the prompt ended inside the reasoning.
          show_reasoning: Whether to show the reasoning at all.
          tools: The tools that the model was offered.
        """
        self._parser = OutputParser(tools, starts_thinking=starts_thinking)
        self._show_reasoning = show_reasoning
        self._deltas: list[OutputDelta] = []
        self._is_reasoning_open = False
        self._has_answer = False

    @property
    def answer(self) -> str:
        """The answer so far, without surrounding whitespace."""
        return join_deltas(self._deltas).content

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The tool calls so far."""
        return join_deltas(self._deltas).tool_calls

    def push(self, text: str) -> None:
        """Shows a piece of the output."""
        self.show(self._parser.push(text))

    def finish(self) -> None:
        """Shows the text held back and the tool calls, and ends the line."""
        self.show(self._parser.finish())
        self._end_reasoning()
        calls = [f"{call.name}({call.arguments})" for call in self.tool_calls]
        self._print("\n".join(calls) if calls and not self._has_answer else "".join(f"\n{call}" for call in calls))

    @staticmethod
    def _print(text: str = "", end: str = "\n") -> None:
        print(make_visible(text) if sys.stdout.isatty() else text, end=end, flush=True)

    def show(self, deltas: Sequence[OutputDelta]) -> None:
        """Shows what a service has already split into reasoning, content and calls."""
        for delta in deltas:
            self._deltas.append(delta)
            if delta.reasoning and self._show_reasoning:
                self._is_reasoning_open = True
                _write_dim(delta.reasoning)
            if delta.content:
                self._end_reasoning()
                self._has_answer = True
                self._print(delta.content, end="")

    def _end_reasoning(self) -> None:
        if self._is_reasoning_open:
            self._is_reasoning_open = False
            _write_dim("\n")


def show_until_first(pieces: Iterator[_T]) -> Iterator[_T]:
    """The same pieces; until the first one arrives, a terminal shows what it waits for."""
    with show_progress(ANSWERING):
        first = next(pieces, None)
    if first is not None:
        yield first
        yield from pieces


def default_show_reasoning() -> bool:
    """Reasoning is for someone watching, not for a log."""
    return sys.stderr.isatty()


def make_visible(text: str) -> str:
    """The text for a terminal, which must not interpret a model's output as commands: escape sequences become visible."""
    return text.translate(_SYMBOLS)


def write_note(text: str) -> None:
    """Writes a line about the output, dimmed on a terminal."""
    _write_dim(text + "\n")


def write_cut(display: Display, limit: str) -> None:
    """Says that an output was cut off, and by what."""
    place = "" if display.answer or display.tool_calls else " inside the reasoning"
    write_note(f"(cut off{place} by {limit})")


def _write_dim(text: str) -> None:
    if sys.stderr.isatty():
        text = f"{_DIM}{make_visible(text)}{_PLAIN}"
    sys.stderr.write(text)
    sys.stderr.flush()
