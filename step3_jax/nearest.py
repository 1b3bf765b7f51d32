"""Hints for an unknown name: the nearest known one, and all of them."""

from __future__ import annotations

import difflib
from collections.abc import Collection


def find_nearest(given: str, known: Collection[str]) -> str | None:
    """The known name that was most likely meant: one with this start, else one with a similar spelling; or None."""
    lower = {name.lower(): name for name in known}
    longer = [name for name in lower if given and name.startswith(given.lower())]
    close = longer or difflib.get_close_matches(given.lower(), lower, 1)
    return lower[min(close, key=len)] if close else None


def describe_known(given: str, known: Collection[str]) -> str:
    """The end of a message about an unknown name: "; did you mean h200-sxm? Known: ..."; all are listed, in their order."""
    nearest = find_nearest(given, known)
    every = ", ".join(known)
    return f"; did you mean {nearest}? Known: {every}" if nearest is not None else f"; known: {every}"
