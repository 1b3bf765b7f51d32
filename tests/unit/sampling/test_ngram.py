"""Guesses: what followed the last n-gram when it occurred before."""

from __future__ import annotations

import functools

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from step3_jax.sampling.ngram import find_drafts
from step3_jax.sampling.speculation import Speculation

WIDTH, ROWS = 24, 3
PLAIN = Speculation(num_speculative_tokens=4, prompt_lookup_max=3, prompt_lookup_min=2)
SINGLE = Speculation(num_speculative_tokens=4, prompt_lookup_max=3, prompt_lookup_min=1)


@functools.partial(jax.jit, static_argnums=2)
def find(history: np.ndarray, lengths: np.ndarray, speculation: Speculation):
    return find_drafts(history, lengths, speculation)


def guess(tokens: list[int], speculation: Speculation) -> list[int] | None:
    """The same for one row, in plain Python."""
    for size in range(speculation.prompt_lookup_max, speculation.prompt_lookup_min - 1, -1):
        for end in range(len(tokens) - 1, size - 1, -1):
            if tokens[end - size : end] == tokens[-size:]:
                more = list(tokens)
                for _ in range(speculation.num_speculative_tokens):
                    more.append(more[len(more) - (len(tokens) - end)])
                return more[len(tokens) :]
    return None


def drafts_of(rows: list[list[int]], speculation: Speculation) -> list[list[int] | None]:
    # What follows a row must not be read: it is all that rows have in common.
    history = np.full((ROWS, WIDTH), 1, np.int32)
    for place, row in enumerate(rows):
        history[place, : len(row)] = row
    lengths = np.array([*map(len, rows), *[1] * (ROWS - len(rows))], np.int32)
    drafts, is_found = find(history, lengths, speculation)
    pairs = zip(np.asarray(drafts).tolist(), np.asarray(is_found).tolist(), strict=True)
    return [draft if found else None for draft, found in pairs][: len(rows)]


def test_the_tokens_behind_the_latest_place_of_the_longest_ngram_are_guessed() -> None:
    rows = [
        [7, 8, 9, 5, 6, 8, 9, 4, 4, 7, 8, 9],  # "7 8 9" counts, though "8 9" came later.
        [8, 9, 5, 6, 8, 9, 4, 3, 2, 8, 9],  # Of "8 9" the later place.
        [1, 2, 3, 4, 5],
    ]
    assert drafts_of(rows, PLAIN) == [[5, 6, 8, 9], [4, 3, 2, 8], None]


def test_what_repeats_is_guessed_to_go_on() -> None:
    assert drafts_of([[3, 5, 5, 5], [9, 2, 6, 2, 6, 2], [5, 5]], PLAIN) == [[5] * 4, [6, 2, 6, 2], None]
    # A single token is an n-gram where that is allowed.
    assert drafts_of([[5, 5], [4, 1, 2, 4], [4]], SINGLE) == [[5] * 4, [1, 2, 4, 1], None]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=WIDTH), min_size=1, max_size=ROWS), st.booleans())
def test_guesses_are_those_of_a_plain_search(rows: list[list[int]], is_single: bool) -> None:
    speculation = SINGLE if is_single else PLAIN
    assert drafts_of(rows, speculation) == [guess(row, speculation) for row in rows]
