"""Files of tools that the command line reads."""

from __future__ import annotations

import json
import pathlib

import pytest

from step3_jax.cli.message import read_tools

TOOL = {"type": "function", "function": {"name": "ping", "parameters": {}}}


def test_tools_come_from_a_file_or_there_are_none(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "tools.json"
    path.write_text(json.dumps([TOOL]))
    assert read_tools(str(path)) == [TOOL]
    assert read_tools(None) == []


@pytest.mark.parametrize("stored", ["{", "{}", "[1]", '[{"type": "web_search"}]', json.dumps([TOOL, TOOL])])
def test_a_file_without_tools_is_refused_by_name(stored: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "tools.json"
    path.write_text(stored)
    with pytest.raises(ValueError, match=r"tools\.json"):
        read_tools(str(path))
    with pytest.raises(ValueError, match="there is no such file"):
        read_tools(str(tmp_path / "none.json"))
