"""Text that asks the tiny model to copy: what has to be copied is in the prompt, and the test's values are kept apart."""

from __future__ import annotations

import json
import pathlib
import random

import pytest

from step3_jax import resources
from tools.tiny.batches import FORM_WEIGHT, Dialogues
from tools.tiny.copying import (
    GROUP_SHARES,
    Calls,
    Values,
    quoted_values,
    recall_record,
    repeated_tokens,
)
from tools.tiny.text_corpus import PICTURES
from tools.tiny.text_tools import format_tool_calls

NAMES = ["Ada", "Turing", "Port Said", "Kant"]
WORDS = [f"word{first}{second}" for first in "abcdefghijklmnopqrstuvwxyz" for second in "aeioulnrst"]
FACTS = [{"question": "Where is Chad?", "reasoning": "The user asks.", "answer": "Chad is in Africa."}]


def _values(seed: int = 0) -> Values:
    return Values(["Oslo", "Lima"], ["Chad"], NAMES, WORDS, random.Random(seed))


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory: pytest.TempPathFactory) -> Dialogues:
    data = tmp_path_factory.mktemp("data")
    (data / "chat-pictures.json").write_text(json.dumps(PICTURES))
    (data / "things.json").write_text("[]")
    return Dialogues(pathlib.Path(data), resources.find("models/step3-tiny"))


def test_repeats_count_but_for_what_cannot_be_known() -> None:
    rng = random.Random(0)
    for _ in range(50):
        ids, weights = repeated_tokens(rng)
        period = weights.index(1.0) - 1
        assert all(ids[place] == ids[place - period] for place in range(period, len(ids)))
        assert sum(weights) == len(ids) - period - (len(ids) // period - 1)


def test_quoted_values_stand_before_their_quotes() -> None:
    values, rng = _values(), random.Random(1)
    for _ in range(50):
        pieces = quoted_values(values, rng)
        for number in range(1, len(pieces), 2):
            assert pieces[number].endswith('"')
            assert pieces[number][:-1] in pieces[0]


def test_recalled_values_stand_in_the_question() -> None:
    values, rng = _values(), random.Random(2)
    for _ in range(100):
        record = recall_record(values, rng)
        assert record["answer"].split()[-1].rstrip(".") in record["question"]
        assert "{" not in record["question"] + record["answer"]


def test_dialogues_of_a_group_offer_the_same_tools_and_call_them() -> None:
    group = Calls(_values(), FACTS, frozenset(), random.Random(4)).group()
    assert all(record["tools"] == group[0]["tools"] for record in group)
    offered = {tool["function"]["name"] for tool in group[0]["tools"]}
    assert {call["name"] for record in group for call in record.get("calls", [])} <= offered


def test_held_out_calls_are_not_drawn() -> None:
    held_out = format_tool_calls([{"name": "get_weather", "arguments": {"city": "Oslo"}}])
    drawn = {True: set(), False: set()}
    for is_held_out, found in drawn.items():
        calls = Calls(_values(), FACTS, frozenset({held_out} if is_held_out else ()), random.Random(5))
        for _ in range(60):
            found |= {format_tool_calls([call]) for record in calls.group() for call in record.get("calls", [])}
    assert held_out in drawn[False]
    assert held_out not in drawn[True]


def test_prefix_and_rest_are_the_whole_dialogue_with_names_and_values_counted(dialogues: Dialogues) -> None:
    calls = Calls(_values(), FACTS, frozenset(), random.Random(6))
    kinds = set()
    for _ in range(12):
        group = calls.group()
        prefix = dialogues.prefix_ids(group[0]["tools"])
        for record in group:
            example = dialogues.after_prefix(record)
            assert [*prefix, *example.ids] == dialogues.record(record).ids
            counted = [token for token, weight in zip(example.ids, example.weights, strict=True) if weight == 1.0]
            assert FORM_WEIGHT in example.weights
            if not record.get("calls"):
                kinds.add("result" if "messages" in record else "no-call")
                assert record["answer"] in dialogues.tokenizer.decode(counted)
                continue
            kinds.add("call" if len(record["calls"]) == 1 else "two-calls")
            written = "".join(
                call["name"] + "".join(_shown(value) + "</" for value in call["arguments"].values())
                for call in record["calls"]
            )
            assert dialogues.tokenizer.decode(counted) == written
    assert kinds == set(GROUP_SHARES)


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
