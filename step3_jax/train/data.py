"""Batches: token sequences packed in rows, and images with the places of their features."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenRows:
    """Rows of packed sequences; sequences of one row do not see each other.

    Attributes:
      ids: Token ids, int32 [B, T].
      targets: The id that follows each token, int32 [B, T].
      weights: Weight of each target in the loss, float32 [B, T]; 0 where nothing is learnt.
      positions: Place of each token in its own sequence, int32 [B, T].
      segments: Number of the sequence a token belongs to, int32 [B, T]; 0 is padding.
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
      rows_each: Feature rows that belong to each picture.
    """
    ids, targets, positions, segments = (np.zeros((num_rows, length), np.int32) for _ in range(4))
    weights = np.zeros((num_rows, length), np.float32)
    image_rows = np.full((num_rows, length), -1, np.int32)
    waiting = next(sequences)
    for row in range(num_rows):
        filled, segment = 0, 0
        while filled == 0 or (image_id is None and filled + len(waiting.ids) <= length):
            count = min(len(waiting.ids), length)
            place = slice(filled, filled + count)
            segment += 1
            ids[row, place] = waiting.ids[:count]
            targets[row, filled : filled + count - 1] = waiting.ids[1:count]
            weights[row, filled : filled + count - 1] = waiting.weights[1:count]
            positions[row, place] = np.arange(count)
            segments[row, place] = segment
            filled += count
            waiting = next(sequences)
        if image_id is not None:
            is_place = ids[row] == image_id
            image_rows[row, is_place] = row * rows_each + np.arange(is_place.sum())
    return TokenRows(ids, targets, weights, positions, segments, image_rows)
