"""Splits what the model writes into reasoning and answer, whole or piece by piece.

The released template ends a prompt inside `<think>`, so the output begins with reasoning; the answer follows the first
`</think>`. Without one, all of it is reasoning.
"""

from __future__ import annotations

OPENING = "<think>"
CLOSING = "</think>"


def is_thinking(prompt: str) -> bool:
    """Whether a prompt ends inside the reasoning, so that the output goes on with it."""
    return prompt.rfind(OPENING) > prompt.rfind(CLOSING)


def split_reasoning(text: str, *, starts_thinking: bool = True) -> tuple[str, str]:
    """Splits a whole output.

    Args:
      text: What the model wrote.
      starts_thinking: Whether the prompt ended inside the reasoning; else reasoning needs its own `<think>` at the
        beginning.

    Returns:
      Reasoning and answer, both without blanks around them.
    """
    splitter = ReasoningSplitter(starts_thinking=starts_thinking)
    pieces = [splitter.push(text), splitter.finish()]
    return "".join(piece[0] for piece in pieces), "".join(piece[1] for piece in pieces)


class ReasoningSplitter:
    """Splits an output that comes in pieces; all pieces together equal what `split_reasoning` gives."""

    def __init__(self, *, starts_thinking: bool = True) -> None:
        self._is_thinking = starts_thinking
        self._may_open = True
        self._held = ""
        self._reasoning = _Trimmed()
        self._answer = _Trimmed()

    def push(self, piece: str) -> tuple[str, str]:
        """What may be shown after this piece: more of the reasoning, more of the answer."""
        return self._split(piece, is_end=False)

    def finish(self) -> tuple[str, str]:
        """What was held back in case it was the begin of a mark."""
        return self._split("", is_end=True)

    def _split(self, piece: str, *, is_end: bool) -> tuple[str, str]:
        self._held += piece
        if self._may_open and not self._open(is_end):
            return "", ""
        if not self._is_thinking:
            return "", self._answer.push(self._take(len(self._held)))
        end = self._held.find(CLOSING)
        if end < 0:
            kept = 0 if is_end else _partial_length(self._held, CLOSING)
            return self._reasoning.push(self._take(len(self._held) - kept)), ""
        reasoning = self._reasoning.push(self._take(end))
        self._take(len(CLOSING))
        self._is_thinking = False
        return reasoning, self._answer.push(self._take(len(self._held)))

    def _open(self, is_end: bool) -> bool:
        """Drops a `<think>` at the very beginning; False while more text must tell whether it is one."""
        start = self._held.lstrip()
        if not is_end and OPENING.startswith(start):
            return start == OPENING and self._open(True)
        if start.startswith(OPENING):
            self._is_thinking, self._held = True, start[len(OPENING) :]
        self._may_open = False
        return True

    def _take(self, length: int) -> str:
        taken, self._held = self._held[:length], self._held[length:]
        return taken


class _Trimmed:
    """Text without blanks at its ends: those that may be its last are held back."""

    def __init__(self) -> None:
        self._blanks = ""
        self._has_begun = False

    def push(self, piece: str) -> str:
        text = self._blanks + piece
        if not self._has_begun:
            text = text.lstrip()
        shown = text.rstrip()
        self._blanks = text[len(shown) :]
        self._has_begun |= bool(shown)
        return shown


def _partial_length(text: str, mark: str) -> int:
    """Length of the longest end of `text` that is a begin of `mark`."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)
