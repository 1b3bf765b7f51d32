"""The sampling parameters of a batch as arrays, so that different requests share one compiled program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from step3_jax.sampling.params import MAX_LOGPROBS, SamplingParams

# If no row with a filter keeps more than this many of the likeliest tokens, they are found without sorting the vocabulary.
NUM_CANDIDATES = 128
# Ids that each row has room for, whatever it uses, so that requests share a program. A request with more makes
# these arrays wider, which needs another program.
NUM_STOP_IDS = 64
NUM_BIASES = 1024
_TINY = float(np.finfo(np.float32).tiny)


class SamplingBatch(NamedTuple):
    """Parameters of each row, on the host or on a device. Lists of token ids are padded with V, which is not a token.

    Unused parameters have a neutral value: options are data, so that they do not need other programs.

    Attributes:
      temperature: 0 for greedy rows.
      top_k: V for all.
      seeds: Two words of a threefry key.
      max_tokens: 0 marks a padding row.
      has_logprobs: Whether log-probabilities are recorded.
      pause_ids: The token after which a row generates no more in the same call, as the allowed tokens are not known yet; -1
        for none.
      stop_ids: Tokens that end the row.
      bias_ids, bias_values: The logit bias.
    """

    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]
    seeds: UInt32[Array, "B 2"]
    repetition_penalty: Float[Array, " B"]
    presence_penalty: Float[Array, " B"]
    frequency_penalty: Float[Array, " B"]
    min_tokens: Int[Array, " B"]
    max_tokens: Int[Array, " B"]
    has_logprobs: Bool[Array, " B"]
    pause_ids: Int[Array, " B"]
    stop_ids: Int[Array, "B stops"]
    bias_ids: Int[Array, "B biases"]
    bias_values: Float[Array, "B biases"]


class SamplingRow(NamedTuple):
    """One row's parameters, with the engine's additions.

    Attributes:
      params: The user's. `max_tokens` and `seed` are ignored.
      max_tokens: Tokens to generate.
      seed_words: See `seed_words`.
      stop_ids: All tokens that end the row, including the model's own.
      pause_id: See `SamplingBatch.pause_ids`.
    """

    params: SamplingParams
    max_tokens: int
    seed_words: tuple[int, int]
    stop_ids: tuple[int, ...]
    pause_id: int = -1


def seed_words(seed: int, sample: int = 0) -> tuple[int, int]:
    """The two 32-bit words of the key of a request's `sample`-th completion.

    The first has the words of `jax.random.key(seed)`; the others' are mixed from both numbers, so that neighbouring
    seeds do not share completions.
    """
    seed %= 2**64
    if sample == 0:
        return seed >> 32, seed & 0xFFFFFFFF
    high, low = np.random.SeedSequence((seed, sample)).generate_state(2, np.uint32)
    return int(high), int(low)


def check_token_ids(row: SamplingRow, vocab_size: int) -> None:
    """Raises ValueError if a token that ends or biases a row is not in the vocabulary."""
    for name, ids in (("stop_token_ids", row.stop_ids), ("logit_bias", row.params.logit_bias or ())):
        outside = [token for token in ids if token >= vocab_size]
        if outside:
            raise ValueError(f"{name} has token ids {outside}; allowed: 0 to {vocab_size - 1}")


def logprob_width(vocab_size: int) -> int:
    """Number of likeliest tokens that are recorded at each step if any row asks for them."""
    return min(MAX_LOGPROBS, vocab_size)


def sampling_batch(rows: Sequence[SamplingRow], vocab_size: int, batch_size: int) -> SamplingBatch:
    """Puts rows in arrays, padded to `batch_size` with rows that generate nothing."""

    def column(values: Sequence[float], fill: float, dtype: type[np.generic]) -> np.ndarray:
        # Numbers of any size are allowed; those that the device cannot hold all mean the same.
        limit = np.iinfo(np.int32).max if dtype is np.int32 else float(np.finfo(np.float32).max)
        kept = [min(max(value, -limit), limit) for value in values]
        return np.array([*kept, *[fill] * (batch_size - len(rows))], dtype)

    params = [row.params for row in rows]
    seeds = np.zeros((batch_size, 2), np.uint32)
    seeds[: len(rows)] = [row.seed_words for row in rows]
    bias = [row.logit_bias or {} for row in params]
    return SamplingBatch(
        temperature=column([0.0 if row.is_greedy else row.temperature for row in params], 0.0, np.float32),
        top_k=column([row.top_k if row.top_k > 0 else vocab_size for row in params], vocab_size, np.int32),
        # The likeliest token is always kept, even if a probability is too small for float32.
        top_p=column([max(row.top_p, _TINY) for row in params], 1.0, np.float32),
        min_p=column([row.min_p for row in params], 0.0, np.float32),
        seeds=seeds,
        # A divisor, so it must not become zero.
        repetition_penalty=column([max(row.repetition_penalty, _TINY) for row in params], 1.0, np.float32),
        presence_penalty=column([row.presence_penalty for row in params], 0.0, np.float32),
        frequency_penalty=column([row.frequency_penalty for row in params], 0.0, np.float32),
        min_tokens=column([row.min_tokens for row in params], 0, np.int32),
        max_tokens=column([row.max_tokens for row in rows], 0, np.int32),
        has_logprobs=column([row.logprobs is not None for row in params], False, np.bool_),
        pause_ids=column([row.pause_id for row in rows], -1, np.int32),
        stop_ids=_ragged([row.stop_ids for row in rows], NUM_STOP_IDS, vocab_size, batch_size, np.int32),
        bias_ids=_ragged([tuple(row) for row in bias], NUM_BIASES, vocab_size, batch_size, np.int32),
        bias_values=_ragged([tuple(row.values()) for row in bias], NUM_BIASES, 0.0, batch_size, np.float32),
    )


def _ragged(
    lists: Sequence[Sequence[float]], least: int, fill: float, batch_size: int, dtype: type[np.generic]
) -> np.ndarray:
    """Lists of different lengths in one array, its width `least` doubled until it suffices."""
    width = least
    while width < max(map(len, lists), default=0):
        width *= 2
    array = np.full((batch_size, width), fill, dtype)
    for row, values in enumerate(lists):
        array[row, : len(values)] = values
    return array
