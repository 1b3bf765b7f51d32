"""A request on its way through the engine: one row for each of its completions."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np
from jaxtyping import Array, Float, Int

from step3_jax.engine.completion import Completion
from step3_jax.engine.request import Prompt, Request, RequestMetrics, RequestOutput, StreamPiece
from step3_jax.sampling.batch import SamplingRow


@dataclasses.dataclass(eq=False)
class Row:
    """One completion: a sequence of the batch.

    Attributes:
      job: What it belongs to.
      completion: Collects its text.
      sampling: Its parameters.
      pages: Its pages of the cache; empty until it is admitted and after it has ended.
      num_read: Prompt tokens in the cache.
      made: Output so far, as the device made it: the token that ended it and what stands behind a stop string too.
      first_token_s, decode_s, compile_s: See `RequestMetrics`.
    """

    job: Job
    completion: Completion
    sampling: SamplingRow
    pages: list[int] = dataclasses.field(default_factory=list)
    num_read: int = 0
    made: list[int] = dataclasses.field(default_factory=list)
    first_token_s: float = 0.0
    decode_s: float = 0.0
    compile_s: float = 0.0

    @property
    def prompt(self) -> Prompt:
        return self.job.request.prompt

    @property
    def num_unread(self) -> int:
        """Prompt tokens still to be read. The last one is left to the first decode step, which needs its logits."""
        return len(self.prompt.token_ids) - 1 - self.num_read

    @property
    def is_ready(self) -> bool:
        """Whether the next thing to do is a decode step."""
        return bool(self.pages) and not self.num_unread

    @property
    def is_done(self) -> bool:
        return self.completion.finish_reason is not None

    @property
    def max_cached(self) -> int:
        """Tokens that the cache must have room for: the last one of the output is never written."""
        return len(self.prompt.token_ids) + self.sampling.max_tokens - 1

    @property
    def num_cached(self) -> int:
        """Tokens in the cache once the prompt is read: all but the last."""
        return len(self.prompt.token_ids) + len(self.made) - 1

    @property
    def last_token(self) -> int:
        return self.made[-1] if self.made else self.prompt.token_ids[-1]


@dataclasses.dataclass(eq=False)
class Job:
    """One request in the engine.

    Attributes:
      request: What is asked for.
      steps_per_piece: Most decode steps between two looks of the host.
      start_s: When it came in, on the engine's clock.
      compile_start_s: The executor's `compile_s` then.
      rows: Its completions.
      pieces: News that nobody has taken yet.
      is_lost: Whether the engine had to give it up, see `Engine.step`.
      features: Image features of its pictures while its prompt is read.
      feature_rows: Row of `features` for each token of the prompt, -1 for none.
    """

    request: Request
    steps_per_piece: int
    start_s: float
    compile_start_s: float
    rows: list[Row] = dataclasses.field(default_factory=list)
    pieces: collections.deque[StreamPiece] = dataclasses.field(default_factory=collections.deque)
    is_lost: bool = False
    features: Float[Array, "M D"] | None = None
    feature_rows: Int[np.ndarray, " T"] | None = None

    @property
    def is_done(self) -> bool:
        return all(row.is_done for row in self.rows)

    def output(self) -> RequestOutput:
        """The whole output, once `is_done`."""
        request, rows = self.request, self.rows
        metrics = RequestMetrics(
            num_prompt_tokens=len(request.prompt.token_ids),
            num_generated_tokens=sum(row.completion.num_tokens for row in rows),
            time_to_first_token_s=min(row.first_token_s for row in rows),
            decode_s=max(row.decode_s for row in rows),
            compile_s=max(row.compile_s for row in rows),
        )
        outputs = tuple(row.completion.output() for row in rows)
        return RequestOutput(request.index, request.prompt.text, request.prompt.token_ids, outputs, metrics)
