"""Requests of a load: from files of every format, and generated."""

from __future__ import annotations

import json
import pathlib

import pytest

from step3_jax.bench.dataset import LoadRequest, make_requests, read_requests
from step3_jax.bench.workload import Lengths

CHAT = [{"role": "user", "content": "Hi\u2028there"}]


def test_lines_of_every_form_are_read(tmp_path: pathlib.Path) -> None:
    lines = [
        {"messages": CHAT, "max_tokens": 7, "source": "ours"},
        {"prompt": "Once", "prompt_tokens": 1},
        {"prompt_tokens": 5, "output_tokens": 3},
    ]
    file = tmp_path / "load.jsonl"
    file.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n", encoding="utf-8")
    chat, prompt, made = read_requests(file)
    assert chat == LoadRequest(CHAT, 7)
    assert prompt == LoadRequest([{"role": "user", "content": "Once"}], None)
    assert len(str(made.messages[0]["content"]).split()) == 5
    assert made.max_tokens == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no requests"),
        ("x", "line 1: 'x' is not a JSON object"),
        ('{"messages": []}', "line 1: `messages` must be a list"),
        ('{"messages": [{"role": "user"}]}', "objects with content"),
        ('{"prompt": 7}', "`prompt` a text"),
        ('{"prompt": "a", "max_tokens": 0}', "max_tokens is 0"),
        ('{"prompt_tokens": 0, "output_tokens": 1}', "of at least 1"),
    ],
)
def test_another_form_is_named(text: str, said: str, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "load.jsonl"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=said):
        read_requests(file)


def test_made_up_requests_differ_and_come_again_with_their_seed() -> None:
    lengths = [Lengths(20, 4)] * 5
    texts = [str(one.messages[0]["content"]) for one in make_requests(lengths, seed=3)]
    assert len(set(texts)) == 5
    assert texts == [str(one.messages[0]["content"]) for one in make_requests(lengths, seed=3)]


def test_a_body_has_what_its_endpoint_takes() -> None:
    one = LoadRequest(CHAT, 7)
    chat = one.body("m", "chat/completions", {"temperature": 0, "max_tokens": 8})
    assert (chat["messages"], chat["max_tokens"], chat["temperature"]) == (CHAT, 8, 0)
    assert "messages" not in one.body("m", "completions", {})
    assert one.body("m", "completions", {})["prompt"] == "Hi\u2028there"
