"""Requests to completions: batches of one bucket each, prefill, then decode calls until every row has ended."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from step3_jax.cache.contiguous import MIN_CACHE_LENGTH, bucket
from step3_jax.engine.completion import Completion
from step3_jax.engine.executor import Executor
from step3_jax.engine.media import encode_prompt_images
from step3_jax.engine.request import Prompt, Request, RequestMetrics, RequestOutput, StreamPiece
from step3_jax.engine.state import PrefillBatch, Report
from step3_jax.engine.stats import EngineStats
from step3_jax.sampling.batch import SamplingRow, check_token_ids, sampling_batch, sampling_mode, seed_words
from step3_jax.text.tokenizer import Tokenizer

MIN_PROMPT_LENGTH = 32
# Steps between two looks of the host when nobody is streaming: the most that a stop string wastes.
STEPS_PER_CALL = 32


@dataclasses.dataclass
class _Row:
    """One completion on its way through a batch, with its times."""

    completion: Completion
    sampling: SamplingRow
    first_token_s: float = 0.0
    decode_s: float = 0.0
    compile_s: float = 0.0

    @property
    def prompt(self) -> Prompt:
        return self.completion.request.prompt


class Engine:
    """Runs requests on an executor, one batch after the other.

    Attributes:
      stats: Counts and times so far.
    """

    def __init__(
        self,
        executor: Executor,
        tokenizer: Tokenizer | None,
        *,
        max_model_len: int,
        eos_ids: Sequence[int],
        max_batch_size: int,
        max_batch_tokens: int,
    ) -> None:
        """Prepares an engine.

        Args:
          executor: Runs the model.
          tokenizer: Makes text; None gives token ids alone.
          max_model_len: Most tokens of prompt and output together.
          eos_ids: The model's own end tokens.
          max_batch_size: Most rows of a batch; rounded down to a power of two.
          max_batch_tokens: Most prompt tokens of a batch, padding counted; a single row may pass it.

        Raises:
          ValueError: If a limit is not positive.
        """
        for name, value in (
            ("max_model_len", max_model_len),
            ("max_batch_size", max_batch_size),
            ("max_batch_tokens", max_batch_tokens),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}; a whole number of at least 1 is needed")
        self.stats = EngineStats()
        self._executor = executor
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._eos_ids = tuple(eos_ids)
        self._max_batch_size = 1 << (max_batch_size.bit_length() - 1)
        self._max_batch_tokens = max_batch_tokens
        self._vocab_size = executor.config.text.vocab_size

    def check(self, request: Request) -> None:
        """Raises ValueError if a request cannot be served; the message says what would be."""
        prompt, params = request.prompt, request.params
        num_tokens, limit = len(prompt.token_ids), self._max_model_len
        if not num_tokens:
            raise ValueError("the prompt has no tokens; at least one is needed")
        outside = [token for token in prompt.token_ids if not 0 <= token < self._vocab_size]
        if outside:
            raise ValueError(f"the prompt has token ids {outside[:8]}; allowed: 0 to {self._vocab_size - 1}")
        num_output = params.max_tokens or max(1, params.min_tokens)
        if num_tokens + num_output > limit:
            raise ValueError(
                f"the prompt has {num_tokens} tokens and {num_output} more are asked for, together "
                f"{num_tokens + num_output}; at most max_model_len = {limit} are allowed: shorten the prompt, lower "
                "max_tokens, or load with a larger max_model_len"
            )
        if params.stop and self._tokenizer is None:
            raise ValueError("stop strings need a tokenizer, and this model has none: give stop_token_ids")
        check_token_ids(self._sampling_row(request, 0), self._vocab_size)

    def generate(self, requests: Sequence[Request]) -> list[RequestOutput]:
        """Runs requests that `check` lets pass; the outputs come in their order."""
        rows = self._rows(requests)
        for _ in self._run(rows, STEPS_PER_CALL):
            pass
        outputs, start = [], 0
        for request in requests:
            outputs.append(_collect(request, rows[start : start + request.params.n]))
            start += request.params.n
        return outputs

    def stream(self, requests: Sequence[Request], steps_per_piece: int) -> Iterator[StreamPiece]:
        """Runs requests that `check` lets pass, with news of each row every `steps_per_piece` tokens.

        Leaving the iterator early ends the work.
        """
        return self._run(self._rows(requests), steps_per_piece)

    def _rows(self, requests: Sequence[Request]) -> list[_Row]:
        return [
            _Row(Completion(request, sample, self._tokenizer, self._eos_ids), self._sampling_row(request, sample))
            for request in requests
            for sample in range(request.params.n)
        ]

    def _sampling_row(self, request: Request, sample: int) -> SamplingRow:
        params = request.params
        eos_ids = () if params.ignore_eos else self._eos_ids
        return SamplingRow(
            params=params,
            max_tokens=params.max_tokens or self._max_model_len - len(request.prompt.token_ids),
            seed_words=seed_words(request.seed, sample),
            stop_ids=tuple(dict.fromkeys((*eos_ids, *params.stop_token_ids))),
        )

    def _run(self, rows: Sequence[_Row], steps_per_call: int) -> Iterator[StreamPiece]:
        start, compile_s = self._now(), self._executor.compile_s
        for batch in self._plan(rows):
            yield from self._run_batch(batch, steps_per_call, start, compile_s)
        self.stats.num_requests += len({id(row.completion.request) for row in rows})

    def _plan(self, rows: Sequence[_Row]) -> Iterator[list[_Row]]:
        """Batches of rows of like length, so that little of them is padding."""
        batch: list[_Row] = []
        for row in sorted(rows, key=lambda row: len(row.prompt.token_ids)):
            length = bucket(len(row.prompt.token_ids), MIN_PROMPT_LENGTH, self._max_model_len)
            num_rows = _power_of_two(len(batch) + 1)
            if batch and (num_rows > self._max_batch_size or num_rows * length > self._max_batch_tokens):
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    def _run_batch(
        self, rows: list[_Row], steps_per_call: int, call_start: float, compile_start: float
    ) -> Iterator[StreamPiece]:
        stats, executor = self.stats, self._executor
        batch_size = _power_of_two(len(rows))
        mode = sampling_mode([row.sampling.params for row in rows], self._vocab_size)
        sampling = sampling_batch([row.sampling for row in rows], self._vocab_size, batch_size)
        longest = max(len(row.prompt.token_ids) + row.sampling.max_tokens for row in rows)
        cache_length = bucket(longest, MIN_CACHE_LENGTH, self._max_model_len)

        start, compiled = self._now(), executor.compile_s
        batch = self._prefill_batch([row.prompt for row in rows], batch_size)
        state, report = executor.prefill(batch, sampling, cache_length=cache_length, mode=mode)
        report = jax.device_get(report)
        stats.prefill_s += self._now() - start
        stats.compile_s += executor.compile_s - compiled
        stats.num_prompt_tokens += sum(len(row.prompt.token_ids) for row in rows)
        stats.num_first_tokens += len(rows)
        for row in rows:
            row.first_token_s = self._now() - call_start
            row.compile_s = executor.compile_s - compile_start
        pushed = np.zeros((batch_size,), np.int32)
        yield from _push(rows, report, pushed)

        while any(row.completion.finish_reason is None for row in rows):
            pushed = report.num_tokens
            is_halted = np.zeros((batch_size,), bool)
            is_halted[: len(rows)] = [row.completion.finish_reason is not None for row in rows]
            start, compiled = self._now(), executor.compile_s
            state, report = executor.decode(state, sampling, is_halted, steps_per_call, mode=mode)
            report = jax.device_get(report)
            elapsed = self._now() - start
            new = report.num_tokens - pushed
            stats.decode_s += elapsed
            stats.compile_s += executor.compile_s - compiled
            stats.num_decode_tokens += int(new.sum())
            for row, num_new in zip(rows, new[: len(rows)], strict=True):
                # A row that ended in the middle of a call took its part of the call's steps.
                row.decode_s += elapsed * float(num_new) / max(int(new.max()), 1)
                if row.completion.finish_reason is None:
                    row.compile_s = executor.compile_s - compile_start
            yield from _push(rows, report, pushed)

    def _prefill_batch(self, prompts: Sequence[Prompt], batch_size: int) -> PrefillBatch:
        longest = max(len(prompt.token_ids) for prompt in prompts)
        length = bucket(longest, MIN_PROMPT_LENGTH, self._max_model_len)
        token_ids = np.zeros((batch_size, length), np.int32)
        lengths = np.ones((batch_size,), np.int32)
        for row, prompt in enumerate(prompts):
            token_ids[row, : len(prompt.token_ids)] = prompt.token_ids
            lengths[row] = len(prompt.token_ids)
        features, rows_of_prompt = encode_prompt_images(self._executor, prompts)
        if features is None:
            return PrefillBatch(jnp.asarray(token_ids), jnp.asarray(lengths))
        feature_rows = np.full((batch_size, length), -1, np.int32)
        for row, (prompt, rows) in enumerate(zip(prompts, rows_of_prompt, strict=True)):
            feature_rows[row, list(prompt.image_places)] = rows
        return PrefillBatch(jnp.asarray(token_ids), jnp.asarray(lengths), features, jnp.asarray(feature_rows))

    def _now(self) -> float:
        """A clock that stands still while programs are compiled."""
        return time.perf_counter() - self._executor.compile_s


def _push(rows: Sequence[_Row], report: Report, pushed: np.ndarray) -> Iterator[StreamPiece]:
    """Hands each completion what the device made since the last report."""
    for index, row in enumerate(rows):
        new = slice(int(pushed[index]), int(report.num_tokens[index]))
        logprobs = report.logprobs and jax.tree.map(lambda buffer: buffer[index, new], report.logprobs)  # noqa: B023
        piece = row.completion.push(report.tokens[index, new].tolist(), int(report.finish[index]), logprobs)
        if piece is not None:
            yield piece


def _collect(request: Request, rows: Sequence[_Row]) -> RequestOutput:
    metrics = RequestMetrics(
        num_prompt_tokens=len(request.prompt.token_ids),
        num_generated_tokens=sum(row.completion.num_tokens for row in rows),
        time_to_first_token_s=min(row.first_token_s for row in rows),
        decode_s=max(row.decode_s for row in rows),
        compile_s=max(row.compile_s for row in rows),
    )
    outputs = tuple(row.completion.output() for row in rows)
    return RequestOutput(request.index, request.prompt.text, request.prompt.token_ids, outputs, metrics)


def _power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()
