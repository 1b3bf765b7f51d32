"""How the tiny model's answers are judged."""

from __future__ import annotations

import json
import pathlib
import random

import numpy as np
import pytest

from tools.tiny.evaluate import AIMS, Result, collect_results, load_baselines, show_figure
from tools.tiny.evaluate_answers import (
    Reply,
    judge,
    parse_calls,
    share_right,
    share_right_digits,
    share_right_functions,
)
from tools.tiny.evaluate_cases import Case, CaseSet, cut_sheet, join_sheet, load_committed_sets, picture_cases
from tools.tiny.evaluate_text import TextScore
from tools.tiny.text_corpus import PICTURES, assistant_text
from tools.tiny.text_tools import FUNCTIONS, draw_arguments, format_tool_calls

CAPITAL = Case("What is the capital of France?", "The capital of France is Paris.")


@pytest.mark.parametrize(
    ("text", "is_right"),
    [
        (assistant_text("The user asks for a capital.", "The capital of France is Paris."), True),
        (assistant_text("Anything at all.", "The capital of France is Paris.\n"), True),
        (assistant_text("The user asks for a capital.", "The capital of France is Paris"), False),
        (assistant_text("The user asks for a capital.", "The capital of France is Rome."), False),
        ("The capital of France is Paris.", False),  # the reasoning has no end
    ],
)
def test_an_answer_is_right_only_as_a_whole_sentence_behind_the_reasoning(text: str, is_right: bool) -> None:
    assert judge(CAPITAL, text).is_right is is_right


def test_calls_of_every_function_are_read_back_as_written() -> None:
    rng = random.Random(0)
    calls = [{"name": name, "arguments": draw_arguments(name, ["Oslo"], ["Chad"], rng)} for name in FUNCTIONS]
    expected = [
        (
            call["name"],
            {key: value if isinstance(value, str) else json.dumps(value) for key, value in call["arguments"].items()},
        )
        for call in calls
    ]
    assert parse_calls(format_tool_calls(calls)) == expected


CALL = format_tool_calls([{"name": "get_time", "arguments": {"city": "Oslo"}}])


@pytest.mark.parametrize(
    "text",
    [
        "It is noon in Oslo.",
        "",
        CALL + " Done.",
        "Well: " + CALL,
        CALL.replace("<｜tool_calls_end｜>", ""),
        CALL.replace("</steptml:invoke>", ""),
        CALL.replace("function<", "<"),
        "<｜tool_calls_begin｜>\n<｜tool_calls_end｜>",
    ],
)
def test_other_text_than_calls_is_no_call(text: str) -> None:
    assert parse_calls(text) is None


def test_a_call_is_right_whatever_the_order_of_its_arguments() -> None:
    right = format_tool_calls([{"name": "add", "arguments": {"a": 1, "b": 2}}])
    turned = format_tool_calls([{"name": "add", "arguments": {"b": 2, "a": 1}}])
    wrong = format_tool_calls([{"name": "add", "arguments": {"a": 2, "b": 1}}])
    case = Case("What is 1 + 2?", right, tools=({"type": "function"},))
    assert judge(case, assistant_text("I need the add tool.", turned)).is_right
    assert not judge(case, assistant_text("I need the add tool.", wrong)).is_right
    assert not judge(case, assistant_text("I need the add tool.", "1 + 2 = 3")).is_right
    texts = (right, wrong, "1 + 2 = 3", format_tool_calls([{"name": "multiply", "arguments": {"a": 1, "b": 2}}]))
    replies = [judge(case, assistant_text("I need the add tool.", text)) for text in texts]
    assert share_right_functions(replies) == 0.5


def _reply(truth: str, said: str) -> Reply:
    return Reply(Case("What number is this?", truth), said, said, truth == said)


def test_digits_count_at_their_place_and_missing_ones_are_wrong() -> None:
    replies = [
        _reply("The number is 1234.", "The number is 1239."),  # 3 of 4
        _reply("The number is 56.", "The number is 5."),  # 1 of 2
        _reply("The number is 78.", "I do not know."),  # 0 of 2
        _reply("The number is 12.", "The number is 12."),  # 2 of 2
    ]
    assert share_right_digits(replies) == pytest.approx(6 / 10)
    assert share_right(replies) == pytest.approx(1 / 4)


def test_a_few_cases_are_spread_over_the_set() -> None:
    cases = CaseSet("x", "x", tuple(Case(str(index), "") for index in range(100)))
    assert [case.question for case in cases.take(3).cases] == ["0", "50", "99"]
    assert cases.take(None) is cases
    assert cases.take(200) is cases


def test_sheets_give_their_tiles_back() -> None:
    tiles = [np.full((64, 64, 3), index, np.uint8) for index in range(13)]
    sheet = join_sheet(tiles)
    assert sheet.shape == (128, 640, 3)
    np.testing.assert_array_equal(list(cut_sheet(sheet, 13)), tiles)


def test_questions_about_pictures_take_turns() -> None:
    pictures = [np.zeros((64, 64, 3), np.uint8)] * 7
    cases = picture_cases(PICTURES["number"], pictures, [str(number) for number in range(7)])
    assert [case.answer for case in cases][:2] == ["The number is 0.", "The number is 1."]
    assert len({case.question for case in cases}) == 5
    assert cases[5].question == cases[0].question


def test_committed_samples_are_whole() -> None:
    folder = pathlib.Path(__file__).parents[2] / "heldout"
    sets = {part.name: part.cases for part in load_committed_sets(folder)}
    assert set(sets) == {"unseen", "seen", "numbers", "handwriting", "capitals", "tool-calls"}
    for name in ("unseen", "seen", "numbers", "handwriting"):
        pictures = [case.picture for case in sets[name]]
        assert all(picture.shape == (64, 64, 3) for picture in pictures)
        assert len({picture.tobytes() for picture in pictures}) == len(pictures), name
    assert all(parse_calls(case.answer) for case in sets["tool-calls"])
    assert all(case.tools for case in sets["tool-calls"])


def _write_baselines(folder: pathlib.Path) -> None:
    entries = [
        ("unseen artist, centred on white", "pixel nearest neighbour", 0.8),
        ("unseen artist, centred on white", "majority class", 0.01),
        ("unseen artist, mildly augmented", "pixel nearest neighbour", 0.2),
        ("new augmentation of a seen drawing", "pixel nearest neighbour", 0.19),
        ("numbers", "chance, per digit", 0.1),
        ("numbers", "chance, whole number", 0.001),
        ("handwriting", "logistic regression", 0.96),
        ("handwriting", "1-nearest neighbour", 0.98),
    ]
    records = [{"test": test, "method": method, "accuracy": figure} for test, method, figure in entries]
    (folder / "picture-baselines.json").write_text(json.dumps(records))
    (folder / "text-baselines.json").write_text(json.dumps({"byte_6gram": 2.16, "byte_6gram_sentences_only": 2.15}))


def test_the_strongest_baseline_stands_beside_the_model(tmp_path: pathlib.Path) -> None:
    _write_baselines(tmp_path)
    baselines = load_baselines(tmp_path)
    assert baselines["handwriting"] == (0.98, "1-nearest neighbour")
    assert baselines["unseen"][0] == pytest.approx((0.8 + 2 * 0.2) / 3)
    assert baselines["numbers"] == (0.001, "chance, whole number")
    assert baselines["numbers-digits"] == (0.1, "chance, per digit")


def test_results_join_figures_baselines_and_aims(tmp_path: pathlib.Path) -> None:
    _write_baselines(tmp_path)
    names = ("unseen-clean", "unseen-mild", "seen", "numbers", "handwriting", "capitals", "tool-calls")
    replies = {name: [_reply("The number is 12.", "The number is 12.")] * 4 for name in names}
    replies["unseen-mild"] = [_reply("This is a dog.", "This is a cat.")] * 4
    text = TextScore(2.5, 1000, 300, np.full((2, 4), 0.25))
    results = {
        row.name: row for row in collect_results(replies, dict.fromkeys(names, ""), text, load_baselines(tmp_path))
    }
    assert list(results)[-3:] == ["tool-calls", "tool-functions", "text"]
    assert list(results)[:4] == ["unseen-clean", "unseen-mild", "unseen", "seen"]
    assert results["unseen"].model == 0.5
    assert results["unseen"].aim == AIMS["unseen"]
    assert results["unseen"].is_reached is False
    assert results["numbers"].is_reached is True
    assert results["numbers-digits"].count == 8
    assert results["unseen-clean"].is_reached is None
    assert results["tool-functions"].model == 0
    assert results["text"].is_reached is False  # less is better, and the aim is the 6-gram's figure
    assert results["text"].baseline == 2.15
    assert results["text"].aim == AIMS["text"]


def test_figures_are_shown_with_their_unit() -> None:
    assert show_figure(0.875, "share") == "87.5%"
    assert show_figure(2.16231, "bits/byte") == "2.162 bits/byte"
    assert show_figure(None, "share") == ""
    assert Result("text", "", "bits/byte", 2.0, 1, aim=2.1).is_reached is True
