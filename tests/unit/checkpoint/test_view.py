"""Parts of a tensor viewed with more axes than it has."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from step3_jax.checkpoint.view import leave_view, read_view

# Shapes, and views of them.
VIEWS = [
    ((24, 5), (3, 4, 2, 5)),
    ((24,), (3, 4, 2)),
    ((5, 8), (5, 1, 4, 2)),
    ((5, 8), (5, 8)),
    ((1, 8), (1, 1, 8)),
    ((6, 1, 4), (2, 3, 1, 2, 2)),
]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(VIEWS), st.data())
def test_a_part_is_read_whole_and_nothing_else(
    case: tuple[tuple[int, ...], tuple[int, ...]], data: st.DataObject
) -> None:
    shape, view = case
    tensor = np.arange(np.prod(shape)).reshape(shape)
    starts = [data.draw(st.integers(0, size - 1)) for size in view]
    index = [slice(start, data.draw(st.integers(start + 1, size))) for start, size in zip(starts, view, strict=True)]
    num_read = 0

    def read(part: tuple[slice, ...]) -> np.ndarray:
        nonlocal num_read
        num_read += tensor[part].size
        return tensor[part]

    np.testing.assert_array_equal(read_view(read, shape, view, index), tensor.reshape(view)[tuple(index)])
    assert num_read == np.prod([part.stop - part.start for part in index])


def test_heads_of_queries_keys_and_values_are_three_pieces() -> None:
    pieces = []

    def read(part: tuple[slice, ...]) -> np.ndarray:
        pieces.append((part[0].start, part[0].stop))
        return np.zeros((part[0].stop - part[0].start, 1792), np.float32)

    read_view(read, (3 * 1792, 1792), (3, 16, 112, 1792), [slice(0, 3), slice(2, 4), slice(0, 112), slice(0, 1792)])
    assert pieces == [(row, row + 224) for row in (224, 1792 + 224, 2 * 1792 + 224)]


@pytest.mark.parametrize("view", [(5, 24), (3, 5, 8), (24, 5, 2)])
def test_another_number_or_order_of_elements_is_no_view(view: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"is not a view of an array of shape \(24, 5\)"):
        read_view(lambda part: np.zeros(1), (24, 5), view, [slice(0, size) for size in view])


def test_what_fills_an_array_up_is_left_out() -> None:
    tensor = np.arange(24).reshape(12, 2)
    filled = np.pad(tensor.reshape(3, 2, 2, 2), [(0, 0), (0, 1), (0, 0), (0, 0)], constant_values=99)
    np.testing.assert_array_equal(leave_view(filled, (12, 2), (3, 2, 2, 2)), tensor)
