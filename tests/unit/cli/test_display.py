"""What of an output goes to stdout and to stderr."""

from __future__ import annotations

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
