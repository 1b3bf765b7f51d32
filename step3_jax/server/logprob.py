"""Log-probabilities in the forms of the two endpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from step3_jax.engine.request import Logprob
from step3_jax.server.protocol.chat import ChoiceLogprobs, ChosenLogprob, TokenLogprob
from step3_jax.server.protocol.completion import CompletionLogprobs
from step3_jax.text.detokenize import Detokenizer
from step3_jax.text.tokenizer import Tokenizer

# JSON has no minus infinity.
LEAST = -9999.0


def chat_logprobs(
    token_ids: Sequence[int], records: Sequence[Mapping[int, Logprob]], num_top: int, tokenizer: Tokenizer
) -> ChoiceLogprobs:
    """Of some tokens of a chat's answer.

    Args:
      token_ids: The tokens.
      records: Of each, the chosen one and the likeliest ones.
      num_top: Likeliest ones that were asked for.
      tokenizer: Knows a token's bytes.
    """
    content = []
    for token, record in zip(token_ids, records, strict=True):
        chosen = _token(token, record[token], tokenizer)
        top = [_token(other, found, tokenizer) for other, found in _likeliest(record, num_top)]
        content.append(ChosenLogprob(token=chosen.token, logprob=chosen.logprob, bytes=chosen.bytes, top_logprobs=top))
    return ChoiceLogprobs(content=content)


class CompletionLogprobWriter:
    """Log-probabilities of one completion, whose text is counted along."""

    def __init__(self, num_top: int, detokenizer: Detokenizer, offset: int = 0) -> None:
        """Starts with no tokens.

        Args:
          num_top: Likeliest ones that were asked for.
          detokenizer: Makes the same text once more, to count its characters.
          offset: Characters of the text before the first token.
        """
        self._num_top = num_top
        self._detokenizer = detokenizer
        self._offset = offset

    def write(self, token_ids: Sequence[int], records: Sequence[Mapping[int, Logprob]]) -> CompletionLogprobs:
        """Of the next tokens."""
        tokens, values, tops, offsets = [], [], [], []
        for token, record in zip(token_ids, records, strict=True):
            text = record[token].decoded_token or ""
            tokens.append(text)
            values.append(_finite(record[token].logprob))
            likeliest = _likeliest(record, self._num_top)
            # Two tokens may have one text; the likelier one is kept.
            top: dict[str, float] = {}
            for _, found in likeliest:
                top.setdefault(found.decoded_token or "", _finite(found.logprob))
            top.setdefault(text, _finite(record[token].logprob))
            tops.append(top)
            offsets.append(self._offset)
            self._offset += len(self._detokenizer.push([token]))
        return CompletionLogprobs(
            tokens=tokens, token_logprobs=list(values), top_logprobs=list(tops), text_offset=offsets
        )


def _likeliest(record: Mapping[int, Logprob], num_top: int) -> list[tuple[int, Logprob]]:
    return sorted(record.items(), key=lambda entry: entry[1].rank)[:num_top]


def _token(token: int, found: Logprob, tokenizer: Tokenizer) -> TokenLogprob:
    text = found.decoded_token or ""
    raw = tokenizer.token_bytes(token)
    return TokenLogprob(token=text, logprob=_finite(found.logprob), bytes=list(text.encode() if raw is None else raw))


def _finite(value: float) -> float:
    return value if math.isfinite(value) else LEAST
