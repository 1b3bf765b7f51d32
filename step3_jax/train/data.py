"""Batches: token sequences packed in rows, and images with the places of their features."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

# The segment of a prefix; those of sequences are above 0.
PREFIX = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenRows:
    """Rows of packed sequences; sequences of one row do not see each other.

    Attributes:
      ids: Token ids, int32 [B, T].
      targets: The id that follows each token, int32 [B, T].
      weights: Weight of each target in the loss, float32 [B, T]; 0 where nothing is learnt.
      positions: Place of each token in its own sequence, int32 [B, T].
      segments: Number of the sequence a token belongs to, int32 [B, T]; 0 is padding, `PREFIX` a prefix that all sequences
        of the row see.
      image_rows: Row of the image features for each image place, int32 [B, T]; -1 elsewhere.
    """

    ids: np.ndarray | jax.Array
    targets: np.ndarray | jax.Array
    weights: np.ndarray | jax.Array
    positions: np.ndarray | jax.Array
    segments: np.ndarray | jax.Array
    image_rows: np.ndarray | jax.Array


class Example(NamedTuple):
    """One training sequence: ids, and for each id how much predicting it counts."""

    ids: list[int]
    weights: list[float]


def dialogue(prompt: Sequence[int], answer: Sequence[int], *, prompt_weight: float = 0.0) -> Example:
    """A prompt and its answer; the answer's ids count 1, the prompt's `prompt_weight`."""
    return Example([*prompt, *answer], [prompt_weight] * len(prompt) + [1.0] * len(answer))


def pack_rows(
    sequences: Iterator[Example],
    *,
    num_rows: int,
    length: int,
    image_id: int | None = None,
    rows_each: int = 0,
) -> TokenRows:
    """Fills rows with whole sequences, one after the other, until the next does not fit.

    Args:
      sequences: Source; as many as fit are taken. A sequence longer than a row is cut.
      num_rows: Rows B.
      length: Tokens T of a row.
      image_id: Id of an image place. With it every row holds one sequence, and the places of row b are numbered
        from b * rows_each.
      rows_each: Feature rows that belong to each image.
    """
    rows = _empty_rows(num_rows, length)
    waiting = next(sequences)
    for row in range(num_rows):
        filled, segment = 0, 0
        while filled == 0 or (image_id is None and filled + len(waiting.ids) <= length):
            segment += 1
            filled = _put(rows, row, filled, waiting, segment=segment)
            waiting = next(sequences)
        if image_id is not None:
            is_place = rows.ids[row] == image_id
            rows.image_rows[row, is_place] = row * rows_each + np.arange(is_place.sum())
    return rows


def pack_prefixed(rows: Sequence[tuple[Sequence[int], Iterable[Example]]], *, length: int) -> TokenRows:
    """Fills each row with a prefix and sequences that all go on from it, so that the prefix is computed once.

    Args:
      rows: For each row the prefix, of which nothing is learnt, and the sequences; from the first that does not fit they
        are left out.
      length: Tokens T of a row.

    Raises:
      ValueError: If a prefix leaves no room for its first sequence.
    """
    packed = _empty_rows(len(rows), length)
    for row, (prefix, sequences) in enumerate(rows):
        start = filled = _put(packed, row, 0, Example(list(prefix), [0.0] * len(prefix)), segment=PREFIX)
        for segment, sequence in enumerate(sequences, start=1):
            if filled + len(sequence.ids) > length:
                break
            filled = _put(packed, row, filled, sequence, segment=segment, position=start)
        if filled == start:
            raise ValueError(f"a prefix of {start} tokens leaves no room for a sequence in a row of {length}")
    return packed


def _empty_rows(num_rows: int, length: int) -> TokenRows:
    shape = num_rows, length
    ids, targets, positions, segments = (np.zeros(shape, np.int32) for _ in range(4))
    return TokenRows(ids, targets, np.zeros(shape, np.float32), positions, segments, np.full(shape, -1, np.int32))


def _put(rows: TokenRows, row: int, start: int, example: Example, *, segment: int, position: int = 0) -> int:
    """Writes a sequence, cut at the row's end, from place `start` on; gives the place after it."""
    count = min(len(example.ids), rows.ids.shape[1] - start)
    end = start + count
    rows.ids[row, start:end] = example.ids[:count]
    rows.targets[row, start : end - 1] = example.ids[1:count]
    rows.weights[row, start : end - 1] = example.weights[1:count]
    rows.positions[row, start:end] = position + np.arange(count)
    rows.segments[row, start:end] = segment
    return end
