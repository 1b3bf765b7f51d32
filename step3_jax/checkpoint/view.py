"""A tensor with more axes than it has on disk, for a sharded model that cuts within an axis.

The elements and their order are the same: a tensor of shape (3 * 16 * 112, 1792) has the view (3, 16, 112, 1792).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Shaped

Slices = tuple[slice, ...]


def read_view(
    read: Callable[[Slices], Shaped[np.ndarray, "..."]],
    shape: Sequence[int],
    view: Sequence[int],
    index: Sequence[slice],
) -> Shaped[np.ndarray, "..."]:
    """Reads a part of a view, and nothing more of the tensor.

    Args:
      read: Reads a part of the tensor, given a slice for each of its axes.
      shape: Shape of the tensor.
      view: Each axis of `shape`, or in its place several whose product it is.
      index: A slice for each axis of `view`, with start and stop inside it.

    Returns:
      The part, with the axes of `view`.

    Raises:
      ValueError: If `view` is not such a shape.
    """
    ends, last = [], 0
    for size in shape:
        first, last = last, last + 1
        while last < len(view) and math.prod(view[first:last]) < size:
            last += 1
        ends.append((first, last))
    if last != len(view) or [math.prod(view[first:last]) for first, last in ends] != list(shape):
        raise ValueError(f"{tuple(view)} is not a view of an array of shape {tuple(shape)}")
    runs = [_find_runs(view[first:last], index[first:last]) for first, last in ends]
    return _read_runs(read, runs).reshape([part.stop - part.start for part in index])


def leave_view(
    array: Shaped[np.ndarray, "..."], shape: Sequence[int], view: Sequence[int]
) -> Shaped[np.ndarray, "..."]:
    """The tensor of `shape` again, without the padding after the rows of an array in the form of `view`."""
    return array[tuple(slice(size) for size in view)].reshape(shape)


def _find_runs(sizes: Sequence[int], index: Sequence[slice]) -> list[slice]:
    """The pieces of one axis that contain a part of several axes."""
    inner = math.prod(sizes[1:])
    rest = index[1:]
    if all(part.stop - part.start == size for part, size in zip(rest, sizes[1:], strict=True)):
        return [slice(index[0].start * inner, index[0].stop * inner)]
    return [
        slice(number * inner + run.start, number * inner + run.stop)
        for number in range(index[0].start, index[0].stop)
        for run in _find_runs(sizes[1:], rest)
    ]


def _read_runs(
    read: Callable[[Slices], Shaped[np.ndarray, "..."]], runs: Sequence[Sequence[slice]], chosen: Slices = ()
) -> Shaped[np.ndarray, "..."]:
    """All combinations of the pieces of each axis, put together."""
    axis = len(chosen)
    if axis == len(runs):
        return read(chosen)
    return np.concatenate([_read_runs(read, runs, (*chosen, run)) for run in runs[axis]], axis)
