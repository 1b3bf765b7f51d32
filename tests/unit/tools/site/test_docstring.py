"""Docstrings as the documentation site reads them."""

from __future__ import annotations

import pytest

pytest.importorskip("griffe", reason="the documentation site's libraries are not installed: make docs installs them")

from tools.site.docstring import split_names


def test_names_that_share_a_line_get_lines_of_their_own() -> None:
    text = "Sums.\n\nArgs:\n    gate, up: Halves of\n        the weight.\n    layer: Its number, or: none.\n"
    assert split_names(text) == (
        "Sums.\n\nArgs:\n    gate: Halves of\n        the weight.\n    up: Halves of\n        the weight.\n"
        "    layer: Its number, or: none.\n"
    )


def test_other_text_is_left_alone() -> None:
    text = "One, two: three.\n\n    an example, indented: code\n"
    assert split_names("One, two: three.\n") == "One, two: three.\n"
    assert "an example" in split_names(text)
