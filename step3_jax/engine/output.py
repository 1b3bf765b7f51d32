"""Turns what the core generates into what users get: text, stop strings and whole outputs, by request id.

It runs outside the core, on any one thread, and only tells it which sequences a stop string has ended.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from step3_jax.engine.completion import Completion
from step3_jax.engine.request import Request, RequestMetrics, RequestOutput, SequenceOutput, StreamPiece
from step3_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass
class _Entry:
    """A request in progress.

    Attributes:
      request: The request.
      place: The prompt's index in its call.
      completions: Its completions.
      first_token_s, last_token_s: For each completion, seconds since the request arrived.
      compile_s: Seconds of compiling since then.
      num_cached_tokens: See `RequestOutput`.
      error: See `RequestOutput`.
    """

    request: Request
    place: int
    completions: list[Completion]
    first_token_s: dict[int, float] = dataclasses.field(default_factory=dict)
    last_token_s: dict[int, float] = dataclasses.field(default_factory=dict)
    compile_s: float = 0.0
    num_cached_tokens: int = 0
    error: str | None = None


class OutputProcessor:
    """Makes the outputs of any number of requests."""

    def __init__(self, tokenizer: Tokenizer | None, eos_ids: Sequence[int]) -> None:
        """Starts without requests.

        Args:
          tokenizer: None gives no text.
          eos_ids: The model's own end tokens.
        """
        self._tokenizer = tokenizer
        self._eos_ids = tuple(eos_ids)
        self._entries: dict[str, _Entry] = {}

    def __len__(self) -> int:
        """Number of unfinished requests."""
        return len(self._entries)

    def check(self, request: Request) -> None:
        """Raises ValueError if a request needs text but there is no tokenizer."""
        if request.params.stop and self._tokenizer is None:
            raise ValueError("stop strings need a tokenizer, but this model has none: give stop_token_ids")

    def add(self, request: Request, place: int = 0) -> None:
        """Starts a request; `place` is the prompt's index in its call."""
        completions = [
            Completion(request, index, place, self._tokenizer, self._eos_ids) for index in range(request.params.n)
        ]
        self._entries[request.request_id] = _Entry(request, place, completions)

    def request_ids(self) -> list[str]:
        """Ids of the unfinished requests."""
        return list(self._entries)

    def push(self, output: SequenceOutput) -> tuple[StreamPiece | None, bool]:
        """Takes what the core generated for a request, which may have ended.

        Returns:
          The completion's new output, None if there is none; and whether the core should abort the sequence, which it still
          runs although a stop string has ended it.
        """
        entry = self._entries.get(output.request_id)
        if entry is None:
            return None, False
        completion = entry.completions[output.index]
        if completion.finish_reason is None:
            if output.token_ids:
                entry.first_token_s.setdefault(output.index, output.time_s)
                entry.last_token_s[output.index] = output.time_s
            entry.compile_s, entry.num_cached_tokens = output.compile_s, output.num_cached_tokens
            entry.error = output.error or entry.error
        piece = completion.push(output)
        return piece, completion.finish_reason is not None and not output.finish

    def take(self, request_id: str) -> RequestOutput | None:
        """Removes and returns the whole output of a request once all its completions have ended; else None."""
        entry = self._entries[request_id]
        if any(completion.finish_reason is None for completion in entry.completions):
            return None
        del self._entries[request_id]
        request = entry.request
        durations = (entry.last_token_s[index] - first for index, first in entry.first_token_s.items())
        metrics = RequestMetrics(
            num_prompt_tokens=len(request.prompt.token_ids),
            num_generated_tokens=sum(completion.num_tokens for completion in entry.completions),
            time_to_first_token_s=min(entry.first_token_s.values(), default=0.0),
            decode_s=max(durations, default=0.0),
            compile_s=entry.compile_s,
        )
        return RequestOutput(
            request_id,
            entry.place,
            request.prompt.text,
            request.prompt.token_ids,
            tuple(completion.output() for completion in entry.completions),
            metrics,
            entry.num_cached_tokens,
            entry.error,
        )
