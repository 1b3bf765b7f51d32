"""Where reasoning ends and the answer begins."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from step3_jax.text.reasoning import ReasoningSplitter, is_thinking, split_reasoning


@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        ("It barks.\n</think>\n\nThis is a dog. ", "It barks.", "This is a dog."),
        ("</think>\nA dog.", "", "A dog."),
        ("<think>\nIt barks.</think> A dog.", "It barks.", "A dog."),
        ("never ends", "never ends", ""),
        ("one</think>two</think>three", "one", "two</think>three"),
        ("a </thin is no mark </think> b", "a </thin is no mark", "b"),
        ("ends in half a mark </thi", "ends in half a mark </thi", ""),
        ("", "", ""),
    ],
)
def test_the_first_closing_mark_ends_the_reasoning(text: str, reasoning: str, answer: str) -> None:
    assert split_reasoning(text) == (reasoning, answer)


@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        ("A plain completion. ", "", "A plain completion."),
        ("no mark </think> here", "", "no mark </think> here"),
        ("<think>Hm.</think>Yes.", "Hm.", "Yes."),
        ("<thi", "", "<thi"),
    ],
)
def test_a_prompt_outside_reasoning_gives_an_answer_at_once(text: str, reasoning: str, answer: str) -> None:
    assert split_reasoning(text, starts_thinking=False) == (reasoning, answer)


@given(
    text=st.lists(st.sampled_from(["</think>", "<think>", "</th", "a", " ", "\n", "<", "é"]), max_size=12).map("".join),
    cuts=st.lists(st.integers(1, 5), max_size=20),
    starts_thinking=st.booleans(),
)
def test_pieces_give_what_the_whole_gives(text: str, cuts: list[int], starts_thinking: bool) -> None:
    splitter = ReasoningSplitter(starts_thinking=starts_thinking)
    shown, rest = [], text
    for cut in cuts:
        shown.append(splitter.push(rest[:cut]))
        rest = rest[cut:]
    shown += [splitter.push(rest), splitter.finish()]
    joined = "".join(piece[0] for piece in shown), "".join(piece[1] for piece in shown)
    assert joined == split_reasoning(text, starts_thinking=starts_thinking)


def test_text_is_shown_as_soon_as_it_can_be_no_mark() -> None:
    splitter = ReasoningSplitter()
    assert splitter.push("It barks </th") == ("It barks", "")
    assert splitter.push("e end") == (" </the end", "")
    assert splitter.push("</think>\nA") == ("", "A")
    assert splitter.push(" dog") == ("", " dog")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("<|BOT|>assistant\n<think>\n", True), ("<think>a</think>", False), ("Once upon a time", False)],
)
def test_the_prompt_says_whether_the_model_is_thinking(prompt: str, expected: bool) -> None:
    assert is_thinking(prompt) is expected
