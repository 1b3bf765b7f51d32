"""Reasoning, content and tool calls in the model's output, in pieces of any size."""

from __future__ import annotations

import itertools
import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from step3_jax.text.output_parser import (
    OutputDelta,
    OutputParser,
    count_reasoning_tokens,
    is_reasoning_end,
    is_thinking,
    parse_output,
)

GOLDENS = pathlib.Path(__file__).parents[2] / "goldens" / "parser"
TOOL_CASES = json.loads((GOLDENS / "toolcall_cases.json").read_text(encoding="utf-8"))
REASONING_CASES = json.loads((GOLDENS / "reasoning_cases.json").read_text(encoding="utf-8"))
TOOLS = TOOL_CASES["tools"]["lib"]
# What a cut call gives is one thing here, streamed or whole: its text. This case wants it dropped from streams.
DROPPED_FROM_STREAMS = "begin_only_stream"

BLOCK, END_BLOCK = "<｜tool_calls_begin｜>", "<｜tool_calls_end｜>"
CALL, END_CALL = "<｜tool_call_begin｜>function<｜tool_sep｜>", "<｜tool_call_end｜>"
MARKER = re.compile(r"(<｜\w+｜>|</?steptml:\w+[^>]*>|</?think>)")

Parsed = tuple[str, str, list[tuple[str, str]]]


def parse(pieces: Iterable[str], tools: Sequence[dict[str, object]] | None, *, starts_thinking: bool = False) -> Parsed:
    """All deltas combined, with their format checked on the way."""
    parser = OutputParser(tools, starts_thinking=starts_thinking)
    return join([delta for piece in pieces for delta in parser.push(piece)] + parser.finish())


def join(deltas: Iterable[OutputDelta]) -> Parsed:
    reasoning, content = "", ""
    calls: list[tuple[str, str]] = []
    ids: set[str] = set()
    for delta in deltas:
        assert delta != OutputDelta(), "an empty delta"
        assert not (delta.reasoning and content), "reasoning after content"
        reasoning += delta.reasoning
        content += delta.content
        for call in delta.tool_calls:
            if call.index == len(calls):
                assert call.id
                assert (bool(call.name), call.arguments) == (True, "")
                ids.add(call.id)
                calls.append((call.name, ""))
            else:
                assert (call.index, call.id, call.name) == (len(calls) - 1, None, None)
                name, arguments = calls[-1]
                calls[-1] = name, arguments + call.arguments
    assert len(ids) == len(calls), "two calls share an id"
    return reasoning, content, calls


def cut(text: str, chunking: str) -> list[str]:
    """A text in the pieces that a chunking of the case files names."""
    if chunking == "markers":
        return [piece for piece in MARKER.split(text) if piece]
    sizes = {"whole": len(text), "chars": 1, "halves": (len(text) + 1) // 2}
    size = sizes[chunking] if chunking in sizes else int(chunking.removeprefix("size:"))
    return [text[start : start + size] for start in range(0, len(text), max(size, 1))]


def splits(text: str, chunkings: Iterable[str]) -> Iterator[list[str]]:
    """Every way to cut a text that is tried: those of its case, single letters, and in two anywhere."""
    yield from (cut(text, chunking) for chunking in chunkings)
    if len(text) < 2_000:
        yield list(text)
        yield from ([text[:at], text[at:]] for at in range(len(text) + 1))


@pytest.mark.parametrize("case", TOOL_CASES["cases"], ids=lambda case: case["id"])
def test_tool_calls_at_every_split(case) -> None:
    tools = TOOL_CASES["tools"][case["tools"]] if case["tools"] else None
    expected = case["expect"]
    for pieces in splits(case["text"], case["chunkings"]):
        reasoning, content, calls = parse(pieces, tools)
        if expected == "no_exception":
            continue
        assert reasoning == ""
        if case["id"] == DROPPED_FROM_STREAMS:
            assert content == case["text"]
        else:
            assert content.strip() == expected["content"].strip(), pieces
        found = [{"name": name, "arguments": json.loads(arguments)} for name, arguments in calls]
        assert found == expected["tool_calls"], pieces


@pytest.mark.parametrize("case", REASONING_CASES["text_cases"], ids=lambda case: case["id"])
def test_reasoning_at_every_split(case) -> None:
    expected = {key: (text or "").strip() for key, text in case["expect"].items()}
    for pieces in splits(case["text"], case["chunkings"]):
        reasoning, content, _ = parse(pieces, None, starts_thinking=True)
        assert {"reasoning_content": reasoning, "content": content} == expected, pieces


@pytest.mark.parametrize("case", REASONING_CASES["with_tools"], ids=lambda case: case["id"])
def test_reasoning_and_then_calls_at_every_split(case) -> None:
    expected = case["expect"]
    for pieces in splits(case["text"], case["chunkings"]):
        reasoning, content, calls = parse(pieces, TOOLS, starts_thinking=True)
        assert (reasoning, content) == (expected["reasoning_content"], expected["content"]), pieces
        found = [{"name": name, "arguments": json.loads(arguments)} for name, arguments in calls]
        assert found == expected["tool_calls"], pieces


@pytest.mark.parametrize("case", REASONING_CASES["token_id_cases"], ids=lambda case: case["id"])
def test_the_last_mark_of_the_ids_says_whether_reasoning_is_over(case) -> None:
    assert is_reasoning_end(case["ids"], case["start"], case["end"]) is case["reasoning_ended"]


@pytest.mark.parametrize(("ids", "count"), [([11, 12, 2, 13], 2), ([11, 12, 13], 3), ([2], 0), ([], 0), ([1, 2, 2], 1)])
def test_reasoning_tokens_are_those_before_its_end(ids: list[int], count: int) -> None:
    assert count_reasoning_tokens(ids, 2) == count


# What vLLM's tests of its Step3 tool parser require, including those that it expects to fail.
WEATHER_CALL = (
    f'{BLOCK}<｜tool_call_begin｜><steptml:invoke name="get_weather"><steptml:parameter name="city">Tokyo'
    f"</steptml:parameter></steptml:invoke>{END_CALL}"
)
ANY_TOOLS = [{"type": "function", "function": {"name": "get_weather"}}]


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("A plain answer without any tool.", "A plain answer without any tool.", []),
        (WEATHER_CALL + END_BLOCK, "", [("get_weather", {"city": "Tokyo"})]),
        (
            f'{WEATHER_CALL}<｜tool_sep｜><｜tool_call_begin｜><steptml:invoke name="get_time"><steptml:parameter '
            f'name="timezone">Asia/Tokyo</steptml:parameter></steptml:invoke>{END_CALL}{END_BLOCK}',
            "",
            [("get_weather", {"city": "Tokyo"}), ("get_time", {"timezone": "Asia/Tokyo"})],
        ),
        (f'{BLOCK}{CALL}<steptml:invoke name="refresh"></steptml:invoke>{END_CALL}{END_BLOCK}', "", [("refresh", {})]),
        (f"Let me look.\n\n{WEATHER_CALL}{END_BLOCK}\n\nSoon.", "Let me look.\n\n\n\nSoon.", [("get_weather", None)]),
        (
            f'{BLOCK}{CALL}<steptml:invoke name="write"><steptml:parameter name="text">He said "hi"\nC:\\dir\\f.txt'
            f"</steptml:parameter></steptml:invoke>{END_CALL}{END_BLOCK}",
            "",
            [("write", {"text": 'He said "hi"\nC:\\dir\\f.txt'})],
        ),
    ],
    ids=["plain", "single", "parallel", "empty", "surrounded", "escaped"],
)
def test_what_other_engines_expect(text: str, content: str, calls: list[tuple[str, dict[str, str] | None]]) -> None:
    for pieces in splits(text, ()):
        _, found_content, found_calls = parse(pieces, ANY_TOOLS)
        assert found_content == content
        assert [name for name, _ in found_calls] == [name for name, _ in calls]
        for (_, arguments), (_, expected) in zip(found_calls, calls, strict=True):
            assert expected is None or json.loads(arguments) == expected


PING = f'{CALL}<steptml:invoke name="ping"></steptml:invoke>{END_CALL}'
CUT = f'{CALL}<steptml:invoke name="patch"><steptml:parameter name="old">x'


@pytest.mark.parametrize(
    ("text", "content", "names"),
    [
        (f"Wait {BLOCK}", f"Wait {BLOCK}", []),
        (f"Wait {BLOCK}{CUT}", f"Wait {BLOCK}{CUT}", []),
        (f"{BLOCK}{PING}{CUT}", CUT, ["ping"]),
        (f"{BLOCK}{PING} and then", "", ["ping"]),
        (f"{BLOCK}{PING}<｜tool_ca", "", ["ping"]),
        (f'{BLOCK}{CALL}<steptml:invoke name="ping"></steptml:invoke>', "", ["ping"]),
        (f'{BLOCK}{CALL}<steptml:invoke name="ping">', f'{BLOCK}{CALL}<steptml:invoke name="ping">', []),
    ],
)
def test_a_call_that_is_cut_off_is_content_and_no_call(text: str, content: str, names: list[str]) -> None:
    for pieces in splits(text, ()):
        _, found, calls = parse(pieces, TOOLS)
        assert (found, [name for name, _ in calls]) == (content, names), pieces


@pytest.mark.parametrize(
    ("inside", "names"),
    [
        (f'{CALL}<steptml:invoke name="ping">{END_CALL}', ["ping"]),
        (f'{CALL}<steptml:invoke name="ping"/>{END_CALL}', ["ping"]),
        (f'{CALL}<steptml:invoke\n name = "ping" ></steptml:invoke>{END_CALL}', ["ping"]),
        (f"{CALL}<steptml:invoke name=ping></steptml:invoke>{END_CALL}", ["ping"]),
        (f"{CALL}<steptml:invoke></steptml:invoke>{END_CALL}{PING}", ["ping"]),
        (f"{CALL}nothing{END_CALL}{PING}", ["ping"]),
        ('<steptml:invoke name="ping"></steptml:invoke>' * 2, ["ping", "ping"]),
    ],
)
def test_small_slips_of_the_model_lose_no_call(inside: str, names: list[str]) -> None:
    for pieces in splits(BLOCK + inside + END_BLOCK, ()):
        _, content, calls = parse(pieces, TOOLS)
        assert (content, [name for name, _ in calls]) == ("", names), pieces


@pytest.mark.parametrize(
    ("text", "starts_thinking", "reasoning", "content"),
    [
        ("It barks.\n</think>\n\nThis is a dog. ", True, "It barks.", "This is a dog."),
        ("<think>\nIt barks.</think> A dog.", True, "It barks.", "A dog."),
        (" \n <think>It barks.</think> A dog.", True, "It barks.", "A dog."),
        ("never ends", True, "never ends", ""),
        ("ends in half a mark </thi", True, "ends in half a mark </thi", ""),
        ("", True, "", ""),
        ("A plain completion. ", False, "", "A plain completion."),
        ("no mark </think> here", False, "", "no mark </think> here"),
        ("<think>Hm.</think>Yes.", False, "Hm.", "Yes."),
        ("<thi", False, "", "<thi"),
    ],
)
def test_where_the_prompt_ended_tells_what_comes_first(
    text: str, starts_thinking: bool, reasoning: str, content: str
) -> None:
    parsed = parse_output(text, starts_thinking=starts_thinking)
    assert (parsed.reasoning, parsed.content, parsed.tool_calls) == (reasoning, content, ())


def test_a_whole_text_gives_finished_calls() -> None:
    parsed = parse_output(f"Hm.</think>So: {BLOCK}{PING}{PING}{END_BLOCK}", TOOLS)
    assert (parsed.reasoning, parsed.content) == ("Hm.", "So:")
    assert [(call.name, call.arguments) for call in parsed.tool_calls] == [("ping", "{}")] * 2
    assert len({call.id for call in parsed.tool_calls}) == 2


PIECES = (
    *("</think>", "<think>", "</th", "a", " ", "\n", "<", ">", "é", BLOCK, END_BLOCK, CALL, END_CALL, PING, CUT),
    *("<｜tool_call_begin｜>", "<｜tool_sep｜>", '<steptml:invoke name="patch">', "</steptml:invoke>"),
    *('<steptml:parameter name="line">', "</steptml:parameter>", "7"),
)


@settings(max_examples=200, deadline=None)
@given(
    text=st.lists(st.sampled_from(PIECES), max_size=14).map("".join),
    cuts=st.lists(st.integers(1, 40), max_size=40),
    starts_thinking=st.booleans(),
)
def test_pieces_give_what_the_whole_gives(text: str, cuts: list[int], starts_thinking: bool) -> None:
    ends = [*itertools.accumulate(cuts), len(text)]
    pieces = [text[start:end] for start, end in itertools.pairwise([0, *(min(end, len(text)) for end in ends)])]
    whole = parse([text], TOOLS, starts_thinking=starts_thinking)
    assert parse(pieces, TOOLS, starts_thinking=starts_thinking) == whole
    for _, arguments in whole[2]:
        assert isinstance(json.loads(arguments), dict)


def test_text_is_given_out_as_soon_as_it_can_be_no_marker() -> None:
    parser = OutputParser(TOOLS)
    assert parser.push("It barks </th") == [OutputDelta(reasoning="It barks")]
    assert parser.push("e end") == [OutputDelta(reasoning=" </the end")]
    assert parser.push("</think>\nA") == [OutputDelta(content="A")]
    assert parser.push(" dog <｜tool_calls") == [OutputDelta(content=" dog")]
    assert parser.push("?") == [OutputDelta(content=" <｜tool_calls?")]


@pytest.mark.parametrize(
    "filler", [" ", "<", "x", "<steptml:parameter", "</think", f"{BLOCK}", f'{CALL}<steptml:invoke name="p">']
)
def test_work_for_a_letter_does_not_grow_with_the_output(filler: str) -> None:
    # Counted in letters that a parser keeps between pieces, which it rescans with each.
    for start in ("", "a</think>b", f"</think>{BLOCK}{CUT}"):
        parser = OutputParser(TOOLS)
        parser.push(start)
        for letter in filler * 200:
            parser.push(letter)
            assert len(parser._held) < 32


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("<|BOT|>assistant\n<think>\n", True), ("<think>a</think>", False), ("Once upon a time", False)],
)
def test_the_prompt_says_whether_the_model_is_thinking(prompt: str, expected: bool) -> None:
    assert is_thinking(prompt) is expected
