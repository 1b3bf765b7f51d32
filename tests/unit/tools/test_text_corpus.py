"""The tiny model's texts: splits, facts, articles, tool calls and their place in the chat format."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from step3_jax import resources
from step3_jax.text.chat_template import ChatTemplate
from step3_jax.text.tokenizer import Tokenizer
from tools.tiny.text_baselines import ngram_bits_per_byte, ngram_codes
from tools.tiny.text_corpus import country_rows, drop_containing, small_rows, split_sentences
from tools.tiny.text_tools import (
    FUNCTIONS,
    ask,
    draw_arguments,
    format_tool_calls,
    function_schema,
    offer,
    tool_examples,
)
from tools.tiny.text_words import clean_sentence, definition_sentence, with_article


def test_no_training_line_holds_a_held_out_sentence() -> None:
    sentences = [f"sentence number {number} is here" for number in range(3000)]
    train, heldout = split_sentences([*sentences, "he said that Sentence Number 7 is here today"])
    assert len(heldout) == 1000
    text = "\n".join(train).lower()
    assert not any(sentence.lower() in text for sentence in heldout)


def test_lines_are_dropped_whatever_their_case() -> None:
    assert drop_containing(["A fine day", "it was A FINE DAY indeed", "rain"], ["a fine day"]) == ["rain"]
    assert drop_containing(["one", "two"], ["three"]) == ["one", "two"]


def test_capitals_are_asked_both_ways() -> None:
    rows = country_rows([("France", "Paris", "Western Europe"), ("Netherlands", "Amsterdam", "Western Europe")])
    answers = {row["question"]: row["answer"] for row in rows}
    assert answers["What is the capital of France?"] == "The capital of France is Paris."
    assert answers["What is the capital of the Netherlands?"] == "The capital of the Netherlands is Amsterdam."
    assert answers["Which country has the capital Paris?"] == "Paris is the capital of France."
    assert answers["Where is the Netherlands?"] == "The Netherlands is in Western Europe."


def test_sums_of_small_talk_are_right() -> None:
    sums = [row for row in small_rows() if row["kind"] == "sum"]
    assert len(sums) == 300
    for row in sums:
        left, right = row["answer"].split(" = ")
        assert sum(int(part) for part in left.split(" + ")) == int(right)


@pytest.mark.parametrize(
    ("noun", "expected"),
    [("apple", "an apple"), ("unicorn", "a unicorn"), ("hour", "an hour"), ("milk", "milk"), ("sun", "the sun")],
)
def test_nouns_take_their_article(noun: str, expected: str) -> None:
    assert with_article(noun) == expected


def test_definitions_become_sentences() -> None:
    assert definition_sentence("violin", "bowed stringed instrument; (music) small") == (
        "A violin is a bowed stringed instrument."
    )


@pytest.mark.parametrize(("text", "clean"), [("  he  ran ; ", ""), ("he ran home;", "he ran home"), ("- no dash", "")])
def test_stray_punctuation_is_no_sentence(text: str, clean: str) -> None:
    assert clean_sentence(text) == clean


def test_ngram_codes_hold_the_bytes_that_end_at_each_place() -> None:
    np.testing.assert_array_equal(ngram_codes(b"ab", 2), [(10 << 8) | 97, (97 << 8) | 98])


def test_ngram_likes_what_it_has_seen() -> None:
    train = b"the cat sat on the mat\n" * 40
    seen, unseen = (ngram_bits_per_byte(train, text) for text in (b"the cat sat on the mat\n", b"zq xv jk wp\n"))
    assert seen < 0.2
    assert unseen > 6


def test_an_empty_model_pays_eight_bits() -> None:
    assert ngram_bits_per_byte(b"\x00", b"abcdef", order=1) == pytest.approx(8, abs=1.1)


def test_examples_of_tools_offer_what_they_call() -> None:
    facts = [{"question": f"q{number}", "reasoning": "r", "answer": "a"} for number in range(300)]
    rows = tool_examples(["Oslo", "Paris"], ["Chad"], facts)
    for row in rows:
        offered = {tool["function"]["name"] for tool in row["tools"]}
        assert {call["name"] for call in row["calls"]} <= offered
        assert bool(row["calls"]) != bool(row["answer"])
    assert {len(row["calls"]) for row in rows} == {0, 1, 2}


def test_questions_name_their_arguments() -> None:
    rng = random.Random(3)
    for name in FUNCTIONS:
        arguments = draw_arguments(name, ["Oslo"], ["Chad"], rng)
        question = ask(name, arguments, rng)
        for value in arguments.values():
            assert isinstance(value, bool) or str(value) in question


def test_trained_tool_calls_are_what_the_chat_template_writes() -> None:
    """A call in the history and a call the model writes are the same tokens."""
    folder = resources.find("models/step3-tiny")
    template, tokenizer = ChatTemplate.load(folder), Tokenizer.load(folder)
    calls = [
        {"name": "switch_light", "arguments": {"room": "living room", "on": True}},
        {"name": "add", "arguments": {"a": 12, "b": 7}},
    ]
    messages = [
        {"role": "user", "content": "Go."},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call} for call in calls]},
    ]
    text = template.render(messages, tools=offer(["add"], random.Random(0)), add_generation_prompt=False)
    assert format_tool_calls(calls) in text
    names = tokenizer.control_tokens
    written = tokenizer.encode(format_tool_calls(calls))
    for name in ("<｜tool_calls_begin｜>", "<｜tool_call_begin｜>", "<｜tool_sep｜>", "<｜tool_calls_end｜>"):
        assert names[name] in written
    assert tokenizer.decode(written) == format_tool_calls(calls)


def test_schemas_are_valid_json_with_all_parameters_required() -> None:
    for tool in (function_schema(name) for name in FUNCTIONS):
        parameters = json.loads(json.dumps(tool))["function"]["parameters"]
        assert set(parameters["properties"]) == set(parameters["required"])
