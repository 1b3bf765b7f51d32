"""Scans a text that arrives in pieces: markers across the boundaries of pieces, and whitespace at its ends."""

from __future__ import annotations

from collections.abc import Sequence


def find_marker(text: str, position: int, markers: Sequence[str]) -> tuple[int, str | None]:
    """The first marker of a text, in time linear in the scanned text.

    Args:
      text: The text so far.
      position: Where to start.
      markers: The markers to find; all start with the same letter and none is a prefix of another.

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
    """Text without whitespace at its ends: whitespace that may be the last is held back."""

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
