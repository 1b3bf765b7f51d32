"""One completion as users see it: text, stop strings and log-probabilities of the tokens that the core generates."""

from __future__ import annotations

from collections.abc import Sequence

from step3_jax.engine.request import ABORTED, FAILED, CompletionOutput, Logprob, Request, SequenceOutput, StreamPiece
from step3_jax.sampling.sampler import StepLogprobs
from step3_jax.text.detokenize import Detokenizer, StopStrings
from step3_jax.text.tokenizer import Tokenizer

_FINISH_REASONS = {"stop": "stop", "length": "length", ABORTED: "abort", FAILED: "error"}


class Completion:
    """Collects one completion of a request.

    Attributes:
      num_tokens: Tokens taken so far, including the one that ended it.
      finish_reason: None while it goes on.
    """

    def __init__(
        self, request: Request, index: int, place: int, tokenizer: Tokenizer | None, eos_ids: Sequence[int]
    ) -> None:
        """Starts an empty completion.

        Args:
          request: The request it belongs to.
          index: Its number among the `n` of the request.
          place: The prompt's index in the call.
          tokenizer: None gives no text.
          eos_ids: The model's own end tokens.
        """
        params = request.params
        self.request = request
        self.index = index
        self.num_tokens = 0
        self.finish_reason: str | None = None
        self._place = place
        self._stop_reason: int | str | None = None
        self._tokenizer = tokenizer
        self._eos_ids = frozenset(eos_ids)
        self._detokenizer: Detokenizer | None = None
        if tokenizer is not None and params.detokenize:
            self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=params.skip_special_tokens)
        self._stops = None
        if params.stop:
            self._stops = StopStrings(params.stop, params.include_stop_str_in_output, after=params.stop_after)
        self._token_ids: list[int] = []
        self._text: list[str] = []
        self._logprobs: list[dict[int, Logprob]] = []

    def push(self, output: SequenceOutput) -> StreamPiece | None:
        """Takes what the core generated.

        Returns:
          The new output; None if there is none, or the completion had ended already.
        """
        if self.finish_reason is not None:
            return None
        ids = output.token_ids
        kept = ids[:-1] if output.finish == "stop" else ids
        text, num_kept = self._push_text(kept)
        # Tokens after a stop string were generated, but are not part of the completion.
        kept = kept[:num_kept]
        self.num_tokens += num_kept
        if self.finish_reason is None and output.finish:
            text += self._finish_text()
            if self.finish_reason is None:
                self.finish_reason = _FINISH_REASONS[output.finish]
                if output.finish == "stop":
                    self._stop_reason = None if ids[-1] in self._eos_ids else ids[-1]
                    self.num_tokens += 1
        records = self._read_logprobs(kept, output.logprobs)
        self._token_ids += kept
        self._text.append(text)
        self._logprobs += records or ()
        if not text and not kept and self.finish_reason is None:
            return None
        return StreamPiece(
            self._place,
            self.index,
            text,
            kept,
            self.finish_reason,
            self._stop_reason,
            records,
            self.request.request_id,
            output.error or None,
        )

    def output(self) -> CompletionOutput:
        """The completion, once `finish_reason` is set."""
        has_logprobs = self.request.params.logprobs is not None
        chosen = [record[token].logprob for token, record in zip(self._token_ids, self._logprobs, strict=False)]
        return CompletionOutput(
            index=self.index,
            text="".join(self._text),
            token_ids=tuple(self._token_ids),
            finish_reason=self.finish_reason or "length",
            stop_reason=self._stop_reason,
            logprobs=tuple(self._logprobs) if has_logprobs else None,
            cumulative_logprob=sum(chosen) if has_logprobs else None,
        )

    def _push_text(self, ids: Sequence[int]) -> tuple[str, int]:
        """New text, and how many of `ids` belong to it: all but those after a stop string."""
        if self._detokenizer is None:
            return "", len(ids)
        if self._stops is None:
            return self._detokenizer.push(ids), len(ids)
        text = ""
        for count, token in enumerate(ids, start=1):
            may_stop = len(self._token_ids) + count > self.request.params.min_tokens
            text += self._push_stops(self._detokenizer.push([token]), may_stop=may_stop)
            if self.finish_reason is not None:
                return text, count
        return text, len(ids)

    def _finish_text(self) -> str:
        """The text that was held back, once there are no more tokens."""
        if self._detokenizer is None:
            return ""
        rest = self._detokenizer.finish()
        if self._stops is None:
            return rest
        text = self._push_stops(rest)
        return text if self.finish_reason is not None else text + self._stops.flush()

    def _push_stops(self, piece: str, *, may_stop: bool = True) -> str:
        if self._stops is None:
            return piece
        text, is_stopped = self._stops.push(piece, may_stop=may_stop)
        if is_stopped:
            self.finish_reason, self._stop_reason = "stop", self._stops.matched
        return text

    def _read_logprobs(
        self, ids: Sequence[int], logprobs: StepLogprobs | None
    ) -> tuple[dict[int, Logprob], ...] | None:
        """vLLM's format: for each position the chosen token and the likeliest ones, by id."""
        width = self.request.params.logprobs
        if width is None or logprobs is None:
            return None
        records = []
        for step, token in enumerate(ids):
            likeliest = zip(logprobs.top_ids[step, :width], logprobs.top_values[step, :width], strict=True)
            record = {int(number): (float(value), rank) for rank, (number, value) in enumerate(likeliest, 1)}
            record.setdefault(token, (float(logprobs.chosen[step]), int(logprobs.rank[step])))
            records.append(
                {number: Logprob(value, rank, self._decode(number)) for number, (value, rank) in record.items()}
            )
        return tuple(records)

    def _decode(self, token: int) -> str | None:
        return self._tokenizer.decode([token]) if self._tokenizer is not None else None
