"""Which sequences ran in a call that failed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from step3_jax.engine.sequence import Sequence


class CallError(Exception):
    """A call failed; the sequences that ran in it."""

    def __init__(self, sequences: list[Sequence], error: Exception) -> None:
        super().__init__(str(error))
        self.sequences = sequences
        self.error = error


@contextlib.contextmanager
def blame(sequences: list[Sequence]) -> Iterator[None]:
    """Turns a call's error into one that names the sequences in it."""
    try:
        yield
    except Exception as error:
        raise CallError(sequences, error) from error
