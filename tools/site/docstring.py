"""Teaches mkdocstrings this project's docstrings, in which one line may describe several names ("gate, up: ...")."""

from __future__ import annotations

import re

import griffe

_JOINT = re.compile(r"^(?P<indent> +)(?P<names>\w+(?:, \w+)+):(?P<text> .*(?:\n(?P=indent) +\S.*)*)$", re.MULTILINE)


class SplitNames(griffe.Extension):
    """Gives each of the names that share a line in Args or Attributes a line of its own."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Changes the docstring of an object that has been loaded."""
        if obj.docstring is not None:
            obj.docstring.value = split_names(obj.docstring.value)


def split_names(text: str) -> str:
    """A docstring in which each line of Args and Attributes has one name."""
    return _JOINT.sub(_write_apart, text)


def _write_apart(match: re.Match[str]) -> str:
    return "\n".join(f"{match['indent']}{name}:{match['text']}" for name in match["names"].split(", "))
