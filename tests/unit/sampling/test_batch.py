"""Parameters as arrays: padding, modes, seeds."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from step3_jax.sampling.batch import (
    SamplingMode,
    SamplingRow,
    check_token_ids,
    sampling_batch,
    sampling_mode,
    seed_words,
)
from step3_jax.sampling.params import SamplingParams


def test_greedy_requests_take_the_program_without_a_sampler() -> None:
    assert (
        sampling_mode([SamplingParams(temperature=0), SamplingParams(temperature=0, top_p=0.5)], 50) == SamplingMode()
    )


def test_the_mode_has_what_any_row_needs() -> None:
    rows = [
        SamplingParams(temperature=0, presence_penalty=1, logprobs=3),
        SamplingParams(min_p=0.1, min_tokens=2),
        SamplingParams(logit_bias={1: 1.0}),
    ]
    assert sampling_mode(rows, 1000) == SamplingMode(
        is_greedy=False, use_min_p=True, use_penalties=True, use_bias=True, use_min_tokens=True, num_logprobs=5
    )


def test_the_vocabulary_is_sorted_only_for_top_p_without_a_small_top_k() -> None:
    short, long, nucleus = SamplingParams(top_k=20, top_p=0.9), SamplingParams(top_k=500), SamplingParams(top_p=0.9)
    assert sampling_mode([short, SamplingParams()], 1000).num_candidates == 128
    assert sampling_mode([short, long], 1000).num_candidates == 1000
    assert sampling_mode([short, nucleus], 1000).num_candidates == 1000
    assert sampling_mode([SamplingParams(top_k=1000)], 1000).num_candidates == 0


def test_rows_fill_up_with_rows_that_make_no_token() -> None:
    params = SamplingParams(top_k=-1, stop_token_ids=[3, 4], logit_bias={7: 2.0})
    batch = sampling_batch([SamplingRow(params, 9, (1, 2), (5, 3, 4))], 50, 2)
    assert batch.max_tokens.tolist() == [9, 0]
    assert batch.top_k.tolist() == [50, 50]
    assert batch.stop_ids.tolist() == [[5, 3, 4, 50], [50] * 4]
    assert batch.bias_ids.tolist() == [[7, 50, 50, 50], [50] * 4]
    assert batch.seeds.tolist() == [[1, 2], [0, 0]]


def test_tokens_outside_the_vocabulary_are_refused() -> None:
    for params in (SamplingParams(stop_token_ids=[50]), SamplingParams(logit_bias={50: 1})):
        with pytest.raises(ValueError, match=r"\[50\]; allowed: 0 to 49"):
            check_token_ids(SamplingRow(params, 1, (0, 0), tuple(params.stop_token_ids)), 50)


def test_the_first_completion_has_jaxs_own_key_of_the_seed() -> None:
    assert seed_words(7) == tuple(np.asarray(jax.random.key_data(jax.random.key(7))).tolist())
    assert seed_words(2**40 + 7) == (2**8, 7)
    assert seed_words(-1) == (2**32 - 1, 2**32 - 1)


def test_completions_of_neighbouring_seeds_have_different_keys() -> None:
    words = [seed_words(seed, sample) for seed in range(8) for sample in range(8)]
    assert len(set(words)) == 64


def test_numbers_that_the_device_cannot_hold_mean_what_the_largest_means():
    params = SamplingParams(
        top_k=2**31, temperature=1e300, repetition_penalty=1e300, max_tokens=None, min_tokens=2**40, top_p=1e-300
    )
    batch = sampling_batch([SamplingRow(params, 2**40, (0, 0), ())], vocab_size=8, batch_size=1)
    assert int(batch.top_k[0]) >= 8
    assert int(batch.min_tokens[0]) == int(batch.max_tokens[0]) == 2**31 - 1
    assert np.isfinite(np.asarray(batch.temperature)).all()
    assert np.isfinite(np.asarray(batch.repetition_penalty)).all()
    assert float(batch.top_p[0]) > 0
    tiny = sampling_batch([SamplingRow(SamplingParams(repetition_penalty=1e-300), 1, (0, 0), ())], 8, 1)
    assert float(tiny.repetition_penalty[0]) > 0
