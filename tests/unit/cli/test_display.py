"""Which part of an output goes to stdout and which to stderr."""

from __future__ import annotations

import sys

import pytest

from step3_jax.cli.display import Display

TOOLS = [{"type": "function", "function": {"name": "ping"}}]
CALLS = (
    '<｜tool_calls_begin｜><｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke name="ping"><steptml:parameter '
    'name="host">a</steptml:parameter></steptml:invoke><｜tool_call_end｜><｜tool_calls_end｜>'
)


@pytest.mark.parametrize(
    ("text", "out", "err"),
    [
        ("Hm.</think>\nYes. ", "Yes.\n", "Hm.\n"),
        ("Hm.", "\n", "Hm.\n"),
        (f"Hm.</think>So: {CALLS}", 'So:\nping({"host": "a"})\n', "Hm.\n"),
        (f"</think>{CALLS}", 'ping({"host": "a"})\n', ""),
    ],
)
def test_the_answer_and_calls_go_to_stdout_and_reasoning_to_stderr(
    text: str, out: str, err: str, capsys: pytest.CaptureFixture[str]
) -> None:
    display = Display(starts_thinking=True, show_reasoning=True, tools=TOOLS)
    for letter in text:
        display.push(letter)
    display.finish()
    assert capsys.readouterr() == (out, err)


def test_without_tools_calls_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(starts_thinking=True, show_reasoning=False)
    display.push(f"Hm.</think>{CALLS}")
    display.finish()
    assert capsys.readouterr().out == CALLS + "\n"
    assert (display.answer, display.tool_calls) == (CALLS, ())


@pytest.mark.parametrize("is_terminal", [False, True])
def test_escape_sequences_of_a_model_reach_no_terminal(
    is_terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    display = Display(starts_thinking=True, show_reasoning=True)
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: is_terminal)
    display.push("a\x1b[2J\n</think>b\x1b]0;title\x07\tc\x9b1m")
    display.finish()
    out, err = capsys.readouterr()
    if is_terminal:
        assert out == "b\u241b]0;title\u2407\tc\ufffd1m\n"
        assert err.startswith("\x1b[2ma\u241b[2J")
    else:
        assert out == "b\x1b]0;title\x07\tc\x9b1m\n"
        assert err.startswith("a\x1b[2J")
