"""Every sampling control against an oracle in numpy, written from vLLM's definitions."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from step3_jax.sampling.batch import SamplingBatch, SamplingRow, sampling_batch, seed_words
from step3_jax.sampling.params import SamplingParams
from step3_jax.sampling.penalties import TokenCounts, count_tokens
from step3_jax.sampling.sampler import (
    gumbel_noise,
    least_by_min_p,
    least_by_rank,
    process_logits,
    sample,
    step_logprobs,
)

VOCAB = 300
PROMPT, OUTPUT, STOPS = [3, 4, 4, 9], [4, 7, 7, 7], (5, 11)


@pytest.fixture
def logits() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(3, VOCAB)).astype(np.float32) * 3


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def oracle_processed(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    logits = logits.astype(np.float64).copy()
    if len(OUTPUT) < params.min_tokens:
        logits[[*STOPS, *params.stop_token_ids]] = -np.inf
    for token, bias in (params.logit_bias or {}).items():
        logits[token] += bias
    for token in range(VOCAB):
        if token in PROMPT or token in OUTPUT:
            factor = params.repetition_penalty
            logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
        logits[token] -= params.frequency_penalty * OUTPUT.count(token)
        logits[token] -= params.presence_penalty * (token in OUTPUT)
    return logits


def oracle_kept(logits: np.ndarray, params: SamplingParams) -> set[int]:
    """Tokens that min_p, then top_k, then top_p leave."""
    probabilities = softmax(logits)
    kept = [token for token in range(VOCAB) if probabilities[token] >= params.min_p * probabilities.max()]
    kept.sort(key=lambda token: -logits[token])
    if params.top_k > 0:
        kept = kept[: params.top_k]
    mass, nucleus = softmax(logits[kept]), []
    for token, probability in zip(kept, mass, strict=True):
        nucleus.append((token, probability))
        if sum(part for _, part in nucleus) >= params.top_p and params.top_p < 1:
            break
    return {token for token, _ in nucleus}


def device_batch(rows: list[SamplingRow], vocab_size: int, batch_size: int) -> SamplingBatch:
    return jax.tree.map(jnp.asarray, sampling_batch(rows, vocab_size, batch_size))


def make_row(params: SamplingParams) -> SamplingRow:
    return SamplingRow(params, 16, seed_words(params.seed or 0), (*STOPS, *params.stop_token_ids))


def make_counts(num_rows: int) -> TokenCounts:
    rows = jnp.ones((num_rows,), jnp.int32)
    ids = jnp.asarray([PROMPT + OUTPUT[:1] + [0] * 3] * num_rows)
    new = jnp.asarray([OUTPUT[1:] + [0]] * num_rows)
    return count_tokens(ids, rows * 5, rows, new, rows * 3, vocab_size=VOCAB)


PROCESSED = {
    "repetition": SamplingParams(repetition_penalty=1.7),
    "repetition below 1": SamplingParams(repetition_penalty=0.6),
    "presence": SamplingParams(presence_penalty=1.5),
    "frequency": SamplingParams(frequency_penalty=-0.7),
    "bias": SamplingParams(logit_bias={4: 2.5, 7: -100, 299: 3.0}),
    "min_tokens": SamplingParams(min_tokens=5, stop_token_ids=[20]),
    "min_tokens reached": SamplingParams(min_tokens=4),
    "all": SamplingParams(
        repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.3, logit_bias={3: 1, 5: 50}, min_tokens=9
    ),
}


@pytest.mark.parametrize("name", PROCESSED)
def test_processed_logits_are_the_oracles(name: str, logits: np.ndarray) -> None:
    # The other rows have other parameters, so that a mix-up of rows shows.
    rows = [SamplingParams(), PROCESSED[name], PROCESSED["all"]]
    batch = device_batch([make_row(row) for row in rows], VOCAB, 3)
    got = process_logits(
        jnp.asarray(logits),
        batch,
        num_tokens=jnp.full((3,), len(OUTPUT)),
        count_tokens=lambda: make_counts(3),
    )
    want = np.stack([oracle_processed(row, params) for row, params in zip(logits, rows, strict=True)])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


FILTERS = {
    "top_k": SamplingParams(top_k=7),
    "top_k 1": SamplingParams(top_k=1),
    "top_k beyond the vocabulary": SamplingParams(top_k=999),
    "top_p": SamplingParams(top_p=0.6),
    "small top_p keeps one": SamplingParams(top_p=1e-6),
    "top_k and top_p": SamplingParams(top_k=12, top_p=0.5),
    "large top_k and top_p": SamplingParams(top_k=200, top_p=0.99),
    "min_p": SamplingParams(min_p=0.2),
    "min_p 1": SamplingParams(min_p=1.0),
    "all": SamplingParams(min_p=0.02, top_k=30, top_p=0.8),
    "none": SamplingParams(),
}


@pytest.mark.parametrize("name", FILTERS)
def test_tokens_left_by_the_filters_are_the_oracles(name: str, logits: np.ndarray) -> None:
    rows = [FILTERS[name], SamplingParams(), SamplingParams(top_k=5)]
    batch = device_batch([make_row(row) for row in rows], VOCAB, 3)
    left = jnp.asarray(logits)
    left = jnp.where(left < least_by_min_p(left.max(-1), batch.min_p)[:, None], -jnp.inf, left)
    left = jnp.where(
        left < least_by_rank(left, batch.top_k, batch.top_p, num_candidates=VOCAB)[:, None], -jnp.inf, left
    )
    for row, params in enumerate(rows):
        assert set(np.flatnonzero(np.isfinite(left[row])).tolist()) == oracle_kept(logits[row], params)
    np.testing.assert_array_equal(np.where(np.isfinite(left), left, 0), np.where(np.isfinite(left), logits, 0))


def test_few_candidates_leave_what_a_full_sort_leaves(logits: np.ndarray) -> None:
    top_k, top_p = jnp.asarray([3, 40, 128]), jnp.asarray([0.9, 0.7, 1.0])
    few = least_by_rank(jnp.asarray(logits), top_k, top_p, num_candidates=128)
    full = least_by_rank(jnp.asarray(logits), top_k, top_p, num_candidates=VOCAB)
    np.testing.assert_array_equal(few, full)


def test_draws_follow_the_distribution_after_temperature() -> None:
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(1, 8)).astype(np.float32))
    params = SamplingParams(temperature=0.5, seed=3)
    rows = 4000
    batch = device_batch([make_row(params)] * rows, 8, rows)
    drawn = sample(
        jnp.repeat(logits, rows, axis=0),
        batch,
        positions=jnp.arange(rows),
        num_tokens=jnp.zeros((rows,), jnp.int32),
    )
    shares = np.bincount(np.asarray(drawn), minlength=8) / rows
    np.testing.assert_allclose(shares, softmax(np.asarray(logits[0]) / 0.5), atol=0.03)


def test_noise_is_of_seed_and_position_not_of_the_row() -> None:
    seeds = jnp.asarray([seed_words(5), seed_words(6), seed_words(5)], jnp.uint32)
    noise = gumbel_noise(seeds, jnp.asarray([9, 9, 9]), 20)
    np.testing.assert_array_equal(noise[0], noise[2])
    assert not np.array_equal(noise[0], noise[1])
    key = jax.random.fold_in(jax.random.key(5), 9)
    np.testing.assert_array_equal(noise[0], jax.random.gumbel(key, (20,)))
    assert not np.array_equal(noise[0], gumbel_noise(seeds, jnp.asarray([8, 9, 9]), 20)[0])


def test_greedy_rows_beside_drawn_rows_take_the_likeliest_token(logits: np.ndarray) -> None:
    rows = [SamplingParams(temperature=0), SamplingParams(seed=1), SamplingParams(temperature=1e-6, top_k=3)]
    batch = device_batch([make_row(row) for row in rows], VOCAB, 3)
    tokens = sample(
        jnp.asarray(logits),
        batch,
        positions=jnp.zeros((3,), jnp.int32),
        num_tokens=jnp.zeros((3,), jnp.int32),
    )
    assert tokens[0] == logits[0].argmax()
    assert tokens[2] == logits[2].argmax()


@jax.jit
def run_sample(logits: jax.Array, batch: SamplingBatch) -> jax.Array:
    num_rows = logits.shape[0]
    positions, num_tokens = jnp.full((num_rows,), 8), jnp.full((num_rows,), len(OUTPUT))
    return sample(logits, batch, positions=positions, num_tokens=num_tokens, count_tokens=lambda: make_counts(num_rows))


def choose(logits: np.ndarray, rows: list[SamplingParams], seed: int = 0) -> list[int]:
    own = [make_row(dataclasses.replace(row, seed=seed)) for row in rows]
    return run_sample(logits[: len(rows)], sampling_batch(own, VOCAB, len(rows))).tolist()


def test_a_greedy_batch_takes_a_branch_of_nothing_but_the_likeliest_token(logits: np.ndarray) -> None:
    batch = device_batch([make_row(SamplingParams(temperature=0))] * 3, VOCAB, 3)
    zeros = jnp.zeros((3,), jnp.int32)
    jaxpr = jax.make_jaxpr(lambda logits: sample(logits, batch, positions=zeros, num_tokens=zeros))(logits)
    assert [equation.primitive.name for equation in jaxpr.eqns].count("cond") == 1
    (outer,) = (equation for equation in jaxpr.eqns if equation.primitive.name == "cond")
    greedy, other = outer.params["branches"]
    assert [equation.primitive.name for equation in greedy.eqns] == ["argmax"]
    costly = ("random_bits", "sort", "top_k")
    assert all(name in str(other) for name in costly)
    outside = [equation for equation in jaxpr.eqns if equation is not outer]
    assert not any(name in str(equation) for name in costly for equation in outside)


@pytest.mark.parametrize("name", [*PROCESSED, *FILTERS])
def test_a_row_chooses_the_same_alone_and_beside_rows_that_use_everything(name: str, logits: np.ndarray) -> None:
    own = (PROCESSED | FILTERS)[name]
    everything = SamplingParams(
        min_p=0.01, top_p=0.9, presence_penalty=1.0, logit_bias={9: 3.0}, min_tokens=9, temperature=1.3
    )
    for temperature in (0.0, 0.8):
        own = dataclasses.replace(own, temperature=temperature)
        for seed in range(3):
            alone = choose(logits, [own], seed)
            assert choose(logits, [own, everything, SamplingParams(temperature=0)], seed)[:1] == alone


def test_logprobs_are_of_the_raw_distribution_with_ranks(logits: np.ndarray) -> None:
    tokens = jnp.asarray([0, int(logits[1].argmax()), 7])
    got = step_logprobs(jnp.asarray(logits), tokens, 5)
    for row in range(3):
        want = np.log(softmax(logits[row].astype(np.float64)))
        order = np.argsort(-want)
        np.testing.assert_allclose(got.chosen[row], want[tokens[row]], rtol=1e-4)
        np.testing.assert_array_equal(got.top_ids[row], order[:5])
        np.testing.assert_allclose(got.top_values[row], want[order[:5]], rtol=1e-4)
        assert got.rank[row] == 1 + list(order).index(int(tokens[row]))


def test_prompt_and_output_are_counted_apart_and_padding_is_not() -> None:
    ids = jnp.asarray([[1, 2, 0, 0], [1, 2, 3, 3], [0, 0, 0, 0]])
    new = jnp.asarray([[4, 4, 0], [3, 0, 0], [1, 1, 1]])
    counts = count_tokens(
        ids, jnp.asarray([2, 4, 0]), jnp.asarray([0, 2, 0]), new, jnp.asarray([2, 1, 0]), vocab_size=6
    )
    assert [np.flatnonzero(row).tolist() for row in counts.in_prompt] == [[1, 2], [1, 2], []]
    assert counts.in_output.tolist() == [[0, 0, 0, 0, 2, 0], [0, 0, 0, 3, 0, 0], [0] * 6]


def test_long_histories_are_counted_block_by_block_each_token_once() -> None:
    rng = np.random.default_rng(2)
    lengths, num_output = np.array([2500, 1024, 1, 1025]), np.array([1700, 0, 0, 30])
    ids = rng.integers(0, 50, (4, 2560))
    nothing = jnp.zeros((4,), jnp.int32)
    counts = count_tokens(
        jnp.asarray(ids),
        jnp.asarray(lengths),
        jnp.asarray(num_output),
        jnp.zeros((4, 1), jnp.int32),
        nothing,
        vocab_size=50,
    )
    for row, (length, output) in enumerate(zip(lengths, num_output, strict=True)):
        prompt, generated = ids[row, : length - output], ids[row, length - output : length]
        assert np.flatnonzero(counts.in_prompt[row]).tolist() == np.unique(prompt).tolist()
        assert counts.in_output[row].tolist() == np.bincount(generated, minlength=50).tolist()
