"""Reading a text that comes in pieces: markers across the borders of pieces, and blanks at its ends."""

from __future__ import annotations

from collections.abc import Sequence


def find_marker(text: str, position: int, markers: Sequence[str]) -> tuple[int, str | None]:
    """The first marker of a text; the time is linear in what is passed.

    Args:
      text: The text so far.
      position: Where to begin.
      markers: What is looked for; all begin with the same letter and none is the start of another.

    Returns:
      Where the marker starts, and the marker. If there is none: where the end of the text may be the start of one (else the
      length of the text), and None.
    """
    if not markers:
        return len(text), None
    first, longest = markers[0][0], max(map(len, markers))
    start = text.find(first, position)
    while start >= 0:
        for marker in markers:
            if text.startswith(marker, start):
                return start, marker
        if len(text) - start < longest and any(marker.startswith(text[start:]) for marker in markers):
            return start, None
        start = text.find(first, start + 1)
    return len(text), None


class Trimmed:
    """Text without blanks at its ends: those that may be its last are held back."""

    def __init__(self) -> None:
        self._blanks: list[str] = []
        self._has_begun = False

    def push(self, text: str) -> str:
        """Takes the next piece.

        Args:
          text: New text.

        Returns:
          What is certain to be part of the result.
        """
        end = len(text.rstrip())
        if not end:
            if self._has_begun:
                self._blanks.append(text)
            return ""
        shown = "".join(self._blanks) + text[:end] if self._has_begun else text[:end].lstrip()
        self._blanks = [text[end:]]
        self._has_begun = True
        return shown
