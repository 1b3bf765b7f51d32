"""Sources of copied tokens: where the tiny model's heads are told to look."""

from __future__ import annotations

import numpy as np
import pytest

from step3_jax import resources
from step3_jax.text.tokenizer import Tokenizer
from step3_jax.train.data import Example, dialogue, pack_prefixed, pack_rows
from tools.tiny.guide import bare_ids, find_sources


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(resources.find("models/step3-tiny"))


def test_the_source_is_the_earlier_token_with_most_equal_neighbours() -> None:
    bare = np.arange(20)
    ids = [
        5,
        6,
        7,
        9,
        6,
        8,
        5,
        6,
        8,
    ]  # the last 6 follows a 5 as the first does, the last 8 follows a 6 as the other does
    rows = pack_rows(iter([Example(ids, [0.0] * 6 + [1.0] * 3)] * 2), num_rows=1, length=9)
    np.testing.assert_array_equal(find_sources(rows, bare), [[-1, -1, -1, -1, -1, 0, 1, 5, -1]])


def test_what_is_not_copied_or_counted_has_no_source() -> None:
    bare = np.array([0, 1, 2, -1, 4])
    rows = pack_rows(iter([Example([3, 4, 1, 3, 4, 2], [1.0, 1.0, 1.0, 1.0, 0.2, 1.0])] * 2), num_rows=1, length=6)
    assert (find_sources(rows, bare) == -1).all()


def test_sources_lie_in_the_prefix_or_the_same_sequence() -> None:
    rows = pack_prefixed([([1, 2], [dialogue([3], [2]), dialogue([4], [3, 1])])], length=8)
    np.testing.assert_array_equal(find_sources(rows, np.arange(9)), [[-1, -1, 1, -1, -1, 0, -1, -1]])


def test_a_value_after_a_quote_is_copied_from_the_word_after_a_blank(tokenizer: Tokenizer) -> None:
    head, copy = (tokenizer.encode(text) for text in ('I live in Budapest, not in Bucharest.\n"', 'Budapest"'))
    rows = pack_rows(iter([dialogue(head, copy)] * 2), num_rows=1, length=len(head) + len(copy))
    sources = find_sources(rows, bare_ids(tokenizer))[0]
    places = np.flatnonzero(sources >= 0)
    assert "".join(tokenizer.decode([head[sources[place]]]) for place in places).strip() == "Budapest"
    assert places[0] == len(head) - 1
