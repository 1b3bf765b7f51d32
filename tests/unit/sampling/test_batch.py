"""Parameters as arrays: padding, seeds."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from step3_jax.sampling.batch import (
    NUM_BIASES,
    NUM_STOP_IDS,
    SamplingRow,
    check_token_ids,
    sampling_batch,
    seed_words,
)
from step3_jax.sampling.params import SamplingParams


def test_what_a_row_does_not_use_has_the_shapes_of_what_it_could() -> None:
    used = SamplingParams(
        top_k=3, min_p=0.1, logit_bias={1: 1.0, 2: -1.0}, stop_token_ids=[4, 5], logprobs=20, presence_penalty=1.0
    )
    shapes = [
        jax.tree.map(
            lambda leaf: (leaf.shape, leaf.dtype), sampling_batch([SamplingRow(params, 9, (0, 0), ids)], 50, 2)
        )
        for params, ids in ((SamplingParams(temperature=0), ()), (used, (4, 5)))
    ]
    assert shapes[0] == shapes[1]


def test_more_ids_than_there_is_room_for_double_the_room() -> None:
    params = SamplingParams(logit_bias=dict.fromkeys(range(NUM_BIASES + 1), 1.0))
    batch = sampling_batch([SamplingRow(params, 9, (0, 0), tuple(range(NUM_STOP_IDS + 1)))], 5000, 1)
    assert batch.bias_ids.shape == batch.bias_values.shape == (1, 2 * NUM_BIASES)
    assert batch.stop_ids.shape == (1, 2 * NUM_STOP_IDS)


def test_rows_fill_up_with_rows_that_make_no_token() -> None:
    params = SamplingParams(top_k=-1, stop_token_ids=[3, 4], logit_bias={7: 2.0})
    batch = sampling_batch([SamplingRow(params, 9, (1, 2), (5, 3, 4))], 50, 2)
    assert batch.max_tokens.tolist() == [9, 0]
    assert batch.top_k.tolist() == [50, 50]
    assert batch.stop_ids[:, :4].tolist() == [[5, 3, 4, 50], [50] * 4]
    assert batch.bias_ids[:, :4].tolist() == [[7, 50, 50, 50], [50] * 4]
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
