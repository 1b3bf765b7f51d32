"""A request as scheduler and executors know it: token ids, pages and counts. No tokenizer and no text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int

from step3_jax.engine.constraint import SequenceConstraint
from step3_jax.engine.request import Request
from step3_jax.sampling.batch import SamplingRow


@dataclasses.dataclass(eq=False)
class Sequence:
    """One completion of a request, in the queue or in a slot.

    Attributes:
      group: The sequences of its request.
      index: Its number in the group.
      sampling: Its parameters, with `max_tokens` capped to what fits in the context.
      steps_per_call: Most decode steps between two of its outputs.
      token_ids: Prompt and output so far.
      num_prompt: Tokens of the prompt.
      num_computed: Tokens in the cache.
      num_sent: Output tokens that were delivered.
      pages: Its cache pages; empty while it waits and after it has ended.
      page_keys: Keys of its first whole pages, see `cache.prefix`.
      num_published: Pages that were published.
      num_preemptions: How often it lost its pages to others.
      num_passed: How often a later sequence was admitted before it.
      is_finished: Whether it has ended.
      constraint: Which tokens are allowed next; None for any.
    """

    group: Group
    index: int
    sampling: SamplingRow
    steps_per_call: int
    token_ids: list[int]
    num_prompt: int
    num_computed: int = 0
    num_sent: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)
    page_keys: list[bytes] = dataclasses.field(default_factory=list)
    num_published: int = 0
    num_preemptions: int = 0
    num_passed: int = 0
    is_finished: bool = False
    constraint: SequenceConstraint | None = None

    @property
    def output(self) -> list[int]:
        """Tokens generated so far, including the one that ended it."""
        return self.token_ids[self.num_prompt :]

    @property
    def is_masked(self) -> bool:
        """Whether some tokens are not allowed next."""
        return self.constraint is not None and self.constraint.is_active

    @property
    def num_output(self) -> int:
        """Number of these tokens."""
        return len(self.token_ids) - self.num_prompt

    @property
    def num_to_prefill(self) -> int:
        """Tokens still to prefill. The last one is left to the next decode step, which needs its logits."""
        return len(self.token_ids) - 1 - self.num_computed

    @property
    def is_ready(self) -> bool:
        """Whether the next thing to do is a decode step."""
        return bool(self.pages) and not self.num_to_prefill

    @property
    def max_cached(self) -> int:
        """The most tokens it can ever have in the cache: the last output token is never written."""
        return self.num_prompt + self.sampling.max_tokens - 1


@dataclasses.dataclass(eq=False)
class Group:
    """The sequences of one request, which share its prompt.

    Attributes:
      request: The request.
      sequences: One for each completion.
      root: The parent of the first page's key, see `cache.prefix`.
      marks: Marks of the pages with image places, see `cache.prefix`.
      start_s: When it arrived, on the engine's clock.
      compile_start_s: Seconds of compiling until then.
      num_cached_tokens: Prompt tokens found in the prefix cache at its first admission; None before that.
      admitted_s: When its first sequence got a slot, on `time.monotonic`; None before that.
      held_pages: The prompt's pages, kept until all sequences have been admitted.
      features: Image features of the whole prompt while it is prefilled.
    """

    request: Request
    root: bytes
    marks: Mapping[int, bytes]
    start_s: float
    compile_start_s: float
    sequences: list[Sequence] = dataclasses.field(default_factory=list)
    num_cached_tokens: int | None = None
    admitted_s: float | None = None
    held_pages: list[int] = dataclasses.field(default_factory=list)
    features: Float[np.ndarray, "places D"] | None = None

    @property
    def is_finished(self) -> bool:
        """Whether all sequences have ended."""
        return all(sequence.is_finished for sequence in self.sequences)

    @property
    def is_waiting_for_prompt(self) -> bool:
        """Whether sequences wait until another one of the group has prefilled the prompt."""
        return any(not sequence.is_finished and not sequence.pages for sequence in self.sequences)


def feature_rows(group: Group, start: int, end: int) -> Int[np.ndarray, " tokens"]:
    """The row of the group's image features for each token in [start, end); -1 where it is not an image place."""
    places = np.asarray(group.request.prompt.image_places, np.int32)
    first, last = np.searchsorted(places, (start, end))
    rows = np.full((end - start,), -1, np.int32)
    rows[places[first:last] - start] = np.arange(first, last, dtype=np.int32)
    return rows
