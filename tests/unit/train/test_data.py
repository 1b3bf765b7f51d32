"""Packing of sequences into rows."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from step3_jax.train.data import PREFIX, Example, TokenRows, dialogue, pack_prefixed, pack_rows


def _pack(sequences: list[Example], **options: int) -> TokenRows:
    return pack_rows(itertools.cycle(sequences), **options)


def test_a_dialogue_learns_the_answer_alone() -> None:
    assert dialogue([5, 6, 7], [8, 9]) == Example([5, 6, 7, 8, 9], [0.0, 0.0, 0.0, 1.0, 1.0])
    assert dialogue([5], [8], prompt_weight=0.5).weights == [0.5, 1.0]


def test_rows_hold_whole_sequences_with_their_own_positions() -> None:
    rows = _pack([Example([1, 2, 3], [1.0] * 3), Example([4, 5], [1.0] * 2)], num_rows=1, length=8)
    np.testing.assert_array_equal(rows.ids, [[1, 2, 3, 4, 5, 1, 2, 3]])
    np.testing.assert_array_equal(rows.segments, [[1, 1, 1, 2, 2, 3, 3, 3]])
    np.testing.assert_array_equal(rows.positions, [[0, 1, 2, 0, 1, 0, 1, 2]])


def test_targets_are_the_following_ids_and_never_of_the_next_sequence() -> None:
    rows = _pack([Example([1, 2, 3], [1.0] * 3), Example([4, 5], [1.0] * 2)], num_rows=1, length=7)
    np.testing.assert_array_equal(rows.ids, [[1, 2, 3, 4, 5, 0, 0]])
    np.testing.assert_array_equal(rows.targets, [[2, 3, 0, 5, 0, 0, 0]])
    np.testing.assert_array_equal(rows.weights, [[1, 1, 0, 1, 0, 0, 0]])
    np.testing.assert_array_equal(rows.segments, [[1, 1, 1, 2, 2, 0, 0]])


def test_a_weight_belongs_to_the_id_that_is_predicted() -> None:
    rows = _pack([dialogue([5, 6, 7], [8, 9])], num_rows=1, length=5)
    np.testing.assert_array_equal(rows.weights, [[0, 0, 1, 1, 0]])
    np.testing.assert_array_equal(rows.targets[rows.weights > 0], [8, 9])


def test_what_does_not_fit_opens_the_next_row() -> None:
    rows = pack_rows(iter([Example([1] * 3, [1.0] * 3), Example([2] * 3, [1.0] * 3), Example([3], [1.0])] * 2),
                     num_rows=2, length=5)  # fmt: skip
    np.testing.assert_array_equal(rows.ids, [[1, 1, 1, 0, 0], [2, 2, 2, 3, 0]])


def test_a_sequence_longer_than_a_row_is_cut() -> None:
    rows = _pack([Example(list(range(1, 10)), [1.0] * 9)], num_rows=2, length=4)
    np.testing.assert_array_equal(rows.ids, [[1, 2, 3, 4]] * 2)
    np.testing.assert_array_equal(rows.targets, [[2, 3, 4, 0]] * 2)


def test_image_places_point_at_the_feature_rows_of_their_own_picture() -> None:
    place = 9
    sequences = [Example([1, place, place, 2], [1.0] * 4), Example([place, 3], [1.0] * 2)]
    rows = _pack(sequences, num_rows=2, length=6, image_id=place, rows_each=10)
    np.testing.assert_array_equal(rows.image_rows, [[-1, 0, 1, -1, -1, -1], [10, -1, -1, -1, -1, -1]])


def test_rows_without_pictures_point_nowhere() -> None:
    rows = _pack([Example([1, 2], [1.0, 1.0])], num_rows=1, length=4)
    assert (rows.image_rows == -1).all()


def test_sequences_go_on_from_the_prefix_of_their_row() -> None:
    sequences = [dialogue([3], [4, 5]), dialogue([6], [7]), dialogue([8], [9])]
    rows = pack_prefixed([([1, 2], sequences[:2]), ([1], sequences)], length=7)
    np.testing.assert_array_equal(rows.ids, [[1, 2, 3, 4, 5, 6, 7], [1, 3, 4, 5, 6, 7, 0]])
    np.testing.assert_array_equal(rows.positions, [[0, 1, 2, 3, 4, 2, 3], [0, 1, 2, 3, 1, 2, 0]])
    np.testing.assert_array_equal(rows.segments, [[PREFIX, PREFIX, 1, 1, 1, 2, 2], [PREFIX, 1, 1, 1, 2, 2, 0]])
    np.testing.assert_array_equal(rows.weights, [[0, 0, 1, 1, 0, 1, 0], [0, 1, 1, 0, 1, 0, 0]])
    np.testing.assert_array_equal(rows.targets[rows.weights > 0], [4, 5, 7, 4, 5, 7])


def test_a_prefix_that_leaves_no_room_is_refused() -> None:
    with pytest.raises(ValueError, match="3 tokens leaves no room"):
        pack_prefixed([([1, 2, 3], [dialogue([4], [5])])], length=4)
