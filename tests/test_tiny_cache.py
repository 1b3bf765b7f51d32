"""The shipped model keeps its answers when its cache is FP8 or INT4."""

from __future__ import annotations

import pathlib

import pytest

from step3_jax.engine.llm import LLM
from tools.tiny.evaluate_answers import ask_all
from tools.tiny.evaluate_cases import load_committed_sets

# The formats by themselves are compared on smaller models by `make test` too.
pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("optimised_file")]
HELD_OUT = pathlib.Path(__file__).parent / "heldout"
# Every third drawing of the unseen artist. Of these 27 the float32 cache has 16 right, FP8 and INT4 17.
EVERY, NUM_RIGHT, MARGIN = 3, 16, 3


@pytest.mark.parametrize("kv_cache_dtype", ["fp8", "int4"])
def test_a_smaller_cache_costs_few_answers(kv_cache_dtype: str, tiny_model_path: pathlib.Path) -> None:
    cases = next(part.cases for part in load_committed_sets(HELD_OUT) if part.name == "unseen")[::EVERY]
    llm = LLM(tiny_model_path, dtype="float32", kv_cache_dtype=kv_cache_dtype)
    replies = ask_all(llm, cases)
    wrong = [(reply.case.answer, reply.answer) for reply in replies if not reply.is_right]
    assert len(replies) - len(wrong) >= NUM_RIGHT - MARGIN, wrong
