"""The shipped model answers held-out questions as well as it did when it was shipped.

The samples are in `tests/heldout`; `python -m tools.tiny.evaluate` measures the full sets. Floors stand a little below
the figures of the shipped weights, so that a change in the code, not chance, makes a test fail.
"""

from __future__ import annotations

import functools
import json
import pathlib

import pytest

from step3_jax.checkpoint.load import load_model
from step3_jax.engine.llm import LLM
from step3_jax.text.tokenizer import Tokenizer
from tools.tiny.evaluate_answers import Reply, ask_all, share_right, share_right_digits, share_right_functions
from tools.tiny.evaluate_cases import load_committed_sets
from tools.tiny.evaluate_text import score_text

pytestmark = pytest.mark.usefixtures("optimised_file")
FLOORS = {
    "unseen": 0.65,
    "seen": 0.80,
    "numbers": 0.60,
    "handwriting": 0.88,
    "capitals": 0.90,
}
DIGITS_FLOOR = 0.80
# Well-formed calls of the right function; the arguments, to be copied from the question, are the harder part.
FUNCTIONS_FLOOR = 0.70
# The busiest expert's share of the tokens, over an even share; without a balance loss it is about 8.
LOAD_CEILING = 4.0
# The model answers hundreds of questions, a minute in all.
thorough = pytest.mark.thorough
HELD_OUT = pathlib.Path(__file__).parent / "heldout"


@pytest.fixture(scope="module")
def replies(tiny_model_path: pathlib.Path) -> dict[str, list[Reply]]:
    """The model's answers to all committed questions."""
    llm = LLM(tiny_model_path, dtype="float32", max_num_seqs=64)
    return {part.name: ask_all(llm, part.cases) for part in load_committed_sets(HELD_OUT)}


@thorough
@pytest.mark.parametrize("name", list(FLOORS))
def test_answers_are_right_letter_by_letter(name: str, replies: dict[str, list[Reply]]) -> None:
    wrong = [(reply.case.answer, reply.answer) for reply in replies[name] if not reply.is_right]
    assert share_right(replies[name]) >= FLOORS[name], f"{len(wrong)} of {len(replies[name])} wrong: {wrong[:8]}"


@thorough
def test_digits_of_held_out_numbers_are_read_at_their_place(replies: dict[str, list[Reply]]) -> None:
    assert share_right_digits(replies["numbers"]) >= DIGITS_FLOOR


@thorough
def test_tools_are_called_by_name_in_the_right_form(replies: dict[str, list[Reply]]) -> None:
    texts = [reply.answer for reply in replies["tool-calls"]]
    assert share_right_functions(replies["tool-calls"]) >= FUNCTIONS_FLOOR, texts


@thorough
def test_reasoning_is_always_closed(replies: dict[str, list[Reply]]) -> None:
    unclosed = [reply.text for part in replies.values() for reply in part if "</think>" not in reply.text]
    assert not unclosed, unclosed[:3]


@functools.cache
def _record() -> dict[str, object]:
    return json.loads((HELD_OUT / "heldout.json").read_text(encoding="utf-8"))


def test_held_out_sentences_cost_less_than_with_a_6gram(tiny_model_path: pathlib.Path) -> None:
    score = score_text(
        load_model(tiny_model_path, "float32", quantization="none"),
        Tokenizer.load(tiny_model_path),
        _record()["sentences"],
    )
    assert score.bits_per_byte < _record()["byte_6gram_bits_per_byte"]
    assert float(score.shares.max()) * score.shares.shape[1] < LOAD_CEILING
