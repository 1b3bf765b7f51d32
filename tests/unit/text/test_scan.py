"""Markers and blanks across the borders of pieces."""

from __future__ import annotations

import pytest

from step3_jax.text.scan import Trimmed, find_marker


@pytest.mark.parametrize(
    ("text", "position", "found"),
    [
        ("ab<x>c", 0, (2, "<x>")),
        ("<x><yy>", 1, (3, "<yy>")),
        ("ab<y", 0, (2, None)),
        ("ab<z", 0, (4, None)),
        ("a<<y", 0, (2, None)),
        ("", 0, (0, None)),
    ],
)
def test_the_first_marker_or_what_may_be_one(text: str, position: int, found: tuple[int, str | None]) -> None:
    assert find_marker(text, position, ("<x>", "<yy>")) == found


def test_without_markers_all_of_it_is_text() -> None:
    assert find_marker("a<x>", 0, ()) == (4, None)


def test_blanks_are_held_until_more_follows() -> None:
    trimmed = Trimmed()
    pieces = [" ", "\n a ", " ", "", "b\n", " "]
    assert [trimmed.push(piece) for piece in pieces] == ["", "a", "", "", "  b", ""]
