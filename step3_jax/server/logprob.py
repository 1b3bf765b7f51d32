"""Log-probabilities in the formats of the two endpoints."""

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
    token_ids: Sequence[int],
    records: Sequence[Mapping[int, Logprob]],
    num_top: int,
    tokenizer: Tokenizer,
    *,
    as_ids: bool = False,
) -> ChoiceLogprobs:
    """Log-probabilities of some tokens of a chat's answer.

    Args:
      token_ids: The tokens.
      records: For each, the chosen one and the likeliest ones.
      num_top: Number of likeliest ones requested.
      tokenizer: Knows a token's bytes.
      as_ids: Whether tokens are named by their ids instead of their texts, of which several may be equal.
    """
    content = []
    for token, record in zip(token_ids, records, strict=True):
        chosen = _token(token, record[token], tokenizer, as_ids)
        top = [_token(other, found, tokenizer, as_ids) for other, found in _likeliest(record, num_top)]
        content.append(ChosenLogprob(token=chosen.token, logprob=chosen.logprob, bytes=chosen.bytes, top_logprobs=top))
    return ChoiceLogprobs(content=content)


class CompletionLogprobWriter:
    """Log-probabilities of one completion; counts its text along the way."""

    def __init__(self, num_top: int, detokenizer: Detokenizer, offset: int = 0, *, as_ids: bool = False) -> None:
        """Starts with no tokens.

        Args:
          num_top: Number of likeliest ones requested.
          detokenizer: Makes the same text once more, to count its characters.
          offset: Characters of the text before the first token.
          as_ids: Whether tokens are named by their ids instead of their texts.
        """
        self._num_top = num_top
        self._detokenizer = detokenizer
        self._offset = offset
        self._as_ids = as_ids

    def write_first(self, token: int, text: str, shown: str) -> CompletionLogprobs:
        """Adds the first token, which has no log-probability.

        Args:
          token: The token.
          text: Its text.
          shown: The part of it that is in the completion's text.
        """
        self._detokenizer.push([token])
        self._offset += len(shown)
        text = _name(token, text, self._as_ids)
        return CompletionLogprobs(tokens=[text], token_logprobs=[None], top_logprobs=[None], text_offset=[0])

    def write(self, token_ids: Sequence[int], records: Sequence[Mapping[int, Logprob]]) -> CompletionLogprobs:
        """Log-probabilities of the next tokens."""
        tokens, values, tops, offsets = [], [], [], []
        for token, record in zip(token_ids, records, strict=True):
            text = _name(token, record[token].decoded_token, self._as_ids)
            tokens.append(text)
            values.append(_finite(record[token].logprob))
            likeliest = _likeliest(record, self._num_top)
            # Two tokens may have the same text; keep the likelier one.
            top: dict[str, float] = {}
            for other, found in likeliest:
                top.setdefault(_name(other, found.decoded_token, self._as_ids), _finite(found.logprob))
            top.setdefault(text, _finite(record[token].logprob))
            tops.append(top)
            offsets.append(self._offset)
            self._offset += len(self._detokenizer.push([token]))
        return CompletionLogprobs(
            tokens=tokens, token_logprobs=list(values), top_logprobs=list(tops), text_offset=offsets
        )


def join_logprobs(first: CompletionLogprobs, second: CompletionLogprobs) -> CompletionLogprobs:
    """Joins those of two runs of tokens."""
    return CompletionLogprobs(
        tokens=first.tokens + second.tokens,
        token_logprobs=first.token_logprobs + second.token_logprobs,
        top_logprobs=first.top_logprobs + second.top_logprobs,
        text_offset=first.text_offset + second.text_offset,
    )


def _likeliest(record: Mapping[int, Logprob], num_top: int) -> list[tuple[int, Logprob]]:
    return sorted(record.items(), key=lambda entry: entry[1].rank)[:num_top]


def _name(token: int, text: str | None, as_ids: bool) -> str:
    return f"token_id:{token}" if as_ids else text or ""


def _token(token: int, found: Logprob, tokenizer: Tokenizer, as_ids: bool) -> TokenLogprob:
    text = found.decoded_token or ""
    raw = tokenizer.token_bytes(token)
    name = _name(token, text, as_ids)
    return TokenLogprob(token=name, logprob=_finite(found.logprob), bytes=list(text.encode() if raw is None else raw))


def _finite(value: float) -> float:
    return value if math.isfinite(value) else LEAST
