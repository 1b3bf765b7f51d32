"""Constraints of all sequences at once: the tokens that must come next, and the masks of a decode call."""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

from step3_jax.engine.scheduler import Scheduler
from step3_jax.engine.sequence import Sequence

# Fewer forced tokens than this are decoded one by one: a chunk costs more than a step.
MIN_FORCED_TOKENS = 4
_MAX_THREADS = 8


class Constrainer:
    """Queries the matchers of sequences, several at once; they should release the interpreter lock meanwhile."""

    def __init__(self) -> None:
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None

    def advance(self, scheduler: Scheduler) -> Iterator[tuple[Sequence, list[int], str]]:
        """Feeds constraints the tokens that their sequences got.

        Yields:
          Sequences with forced tokens, for which they have pages; and sequences that cannot continue, with the
          reason.
        """
        for sequence in scheduler.running:
            if sequence.constraint is None or sequence.is_finished:
                continue
            try:
                sequence.constraint.follow(sequence.output)
                forced = _find_forced(sequence)
                forced = forced[: scheduler.extend(sequence, len(forced))]
                if len(forced) < MIN_FORCED_TOKENS:
                    continue
                sequence.constraint.follow([*sequence.output, *forced])
            except Exception as error:
                yield sequence, [], _describe(error)
            else:
                yield sequence, forced, ""

    def fill_masks(
        self, scheduler: Scheduler, vocab_size: int
    ) -> tuple[Int[np.ndarray, "B words"] | None, list[tuple[Sequence, str]]]:
        """The tokens that the sequences in slots may get next.

        Returns:
          Masks, see `DecodeBatch.mask`, or None if all may get any token; and the sequences that cannot continue, with the
          reason.
        """
        rows = [
            (slot, one)
            for slot, one in enumerate(scheduler.slots)
            if one is not None and one.is_ready and one.is_masked
        ]
        if not rows:
            return None, []
        masks = np.full((len(scheduler.slots), -(-vocab_size // 32)), -1, np.int32)

        def fill(row: tuple[int, Sequence]) -> tuple[Sequence, str]:
            slot, sequence = row
            try:
                _fill(sequence, masks[slot])
            except Exception as error:
                return sequence, _describe(error)
            return sequence, ""

        if len(rows) > 1 and self._pool is None:
            threads = min(_MAX_THREADS, os.cpu_count() or 1)
            self._pool = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="mask")
        filled = map(fill, rows) if len(rows) == 1 or self._pool is None else self._pool.map(fill, rows)
        return masks, [(sequence, error) for sequence, error in filled if error]


def _find_forced(sequence: Sequence) -> list[int]:
    """Forced tokens that need not be decoded; the last one, and any that end the sequence, are decoded."""
    params = sequence.sampling.params
    # Only decode steps give their log-probabilities.
    if sequence.constraint is None or not sequence.is_ready or params.logprobs is not None:
        return []
    forced = sequence.constraint.find_forced()
    forced = forced[: max(0, sequence.sampling.max_tokens - sequence.num_output - 1)]
    ends = [place for place, token in enumerate(forced) if token in sequence.sampling.stop_ids]
    return forced[: ends[0]] if ends else forced


def _fill(sequence: Sequence, mask: Int[np.ndarray, " words"]) -> None:
    if sequence.constraint is None:
        return
    sequence.constraint.fill(mask)
    if sequence.num_output < sequence.sampling.params.min_tokens:
        kept = mask.view(np.uint32).copy()
        for token in sequence.sampling.stop_ids:
            kept[token // 32] &= ~np.uint32(1 << token % 32)
        # An output that can only end does end, however short it is.
        if kept.any():
            mask.view(np.uint32)[:] = kept
    if not mask.any():
        raise ValueError("no token is allowed next")


def _describe(error: Exception) -> str:
    return f"its structured output cannot continue: {error or type(error).__name__}"
