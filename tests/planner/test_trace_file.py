"""Traces: what their lines may contain, and the resulting contexts."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from step3_jax.planner.trace_file import TraceRequest, count_contexts, read_trace


def write(folder: pathlib.Path, text: str) -> pathlib.Path:
    file = folder / "trace.jsonl"
    file.write_text(text)
    return file


def test_requests_are_those_of_the_lines(tmp_path: pathlib.Path) -> None:
    lines = [{"prompt_tokens": 3, "output_tokens": 9, "model": "x"}, {"prompt_tokens": 1, "output_tokens": 1}]
    file = write(tmp_path, "\n\n".join(map(json.dumps, lines)) + "\n")
    assert read_trace(file) == [TraceRequest(3, 9), TraceRequest(1, 1)]


def test_requests_come_in_the_order_of_their_arrival(tmp_path: pathlib.Path) -> None:
    lines = [{"prompt_tokens": n, "output_tokens": 1, "arrival_s": at} for n, at in ((1, 2.5), (2, 0), (3, 1))]
    found = read_trace(write(tmp_path, "\n".join(map(json.dumps, lines))))
    assert [one.prompt_tokens for one in found] == [2, 3, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"trace\.jsonl has no requests"),
        ("x", r"line 1: 'x' is not JSON"),
        ('{"prompt_tokens": 1, "output_tokens": 1}\n{"prompt_tok', "line 2: .* is cut off"),
        ("[1, 2]", r"line 1: \[1, 2\] is not an object"),
        ('{"prompt_tokens": 3}', "line 1: output_tokens is null"),
        ('\n{"prompt_tokens": 0, "output_tokens": 1}', "line 2: prompt_tokens is 0"),
        ('{"prompt_tokens": true, "output_tokens": 1}', "prompt_tokens is true"),
        ('{"prompt_tokens": 65537, "output_tokens": 1}', "line 1: a prompt of 65,537 tokens; at most 65,536"),
        ('{"prompt_tokens": 65536, "output_tokens": 1}', "line 1: .* are 65,537 together"),
        ('{"prompt_tokens": 1, "output_tokens": 1, "arrival_s": -1}', "line 1: arrival_s is -1"),
        ('{"prompt_tokens": 1, "output_tokens": 1, "arrival_s": Infinity}', "line 1: arrival_s is Infinity"),
        (
            '{"prompt_tokens": 1, "output_tokens": 1, "arrival_s": 1}\n{"prompt_tokens": 1, "output_tokens": 1}',
            "1 of 2 requests have arrival_s",
        ),
    ],
)
def test_a_mistake_is_named_with_its_line(text: str, message: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_trace(write(tmp_path, text))


def test_bytes_that_are_no_text_are_named_with_their_line(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_bytes(b'{"prompt_tokens": 1, "output_tokens": 1}\n\xff\xfe')
    with pytest.raises(ValueError, match="line 2: not UTF-8"):
        read_trace(file)


def test_a_file_that_is_not_there_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"none\.jsonl cannot be read: No such file"):
        read_trace(tmp_path / "none.jsonl")


def test_limits_are_the_callers(tmp_path: pathlib.Path) -> None:
    file = write(tmp_path, '{"prompt_tokens": 100000, "output_tokens": 1}')
    assert read_trace(file, max_tokens=None) == [TraceRequest(100_000, 1)]


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=20))
def test_each_token_is_counted_at_its_context(lengths: list[tuple[int, int]]) -> None:
    contexts, counts = count_contexts([TraceRequest(*pair) for pair in lengths])
    each = [prompt + step for prompt, output in lengths for step in range(output)]
    expected, repeated = np.unique(each, return_counts=True)
    assert contexts.tolist() == expected.tolist()
    assert counts.tolist() == repeated.tolist()
