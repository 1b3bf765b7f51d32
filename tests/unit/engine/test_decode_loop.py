"""The decode loop over a model of pairs: guesses change how many steps it takes, and nothing in the output."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Array, Float, Int

from step3_jax.engine.decode_loop import decode_loop
from step3_jax.engine.state import (
    FULL,
    RUNNING,
    STOPPED,
    DecodeBatch,
    Report,
    RowState,
    begin_rows,
    leaving_rows,
    next_tokens,
    place_tokens,
    verify_tokens,
)
from step3_jax.layers.attention import CacheStep
from step3_jax.sampling.batch import SamplingBatch, SamplingRow, sampling_batch
from step3_jax.sampling.params import SamplingParams
from step3_jax.sampling.sampler import StepLogprobs
from step3_jax.sampling.speculation import Speculation

ROWS, VOCAB_SIZE, WIDTH, MAX_STEPS = 3, 24, 96, 16
FOUR = Speculation(num_speculative_tokens=4, prompt_lookup_max=3, prompt_lookup_min=1)


class Row(NamedTuple):
    """A sequence: its prompt, its parameters, and what it got."""

    prompt: list[int]
    sampling: SamplingRow


class Output(NamedTuple):
    """What a row got: tokens, how it ended, and its log-probabilities."""

    tokens: list[int]
    finish: int
    logprobs: list[StepLogprobs]


@functools.partial(jax.jit, static_argnames=("speculation",))
def call(
    weights: Float[Array, "V V V"],
    cache: Int[Array, "B M"],
    batch: DecodeBatch,
    sampling: SamplingBatch,
    num_steps: int,
    leave_early: bool,
    speculation: Speculation | None,
) -> tuple[Int[Array, "B M"], Report]:
    """A decode call of a model whose cache is its tokens, and whose logits are those of the last two."""

    def forward(
        ids: Int[Array, "B T"], cache: Int[Array, "B M"], step: CacheStep
    ) -> tuple[Float[Array, "B T V"], Int[Array, "B M"]]:
        order, rows = jnp.arange(ids.shape[1]), jnp.arange(ROWS)[:, None]
        places = step.lengths[:, None] - ids.shape[1] + order
        is_own = places >= 0
        if step.num_new is not None:
            is_own &= order >= ids.shape[1] - step.num_new[:, None]
        cache = cache.at[rows, jnp.where(is_own, places, WIDTH)].set(ids, mode="drop")
        return weights[cache[rows, jnp.maximum(places - 1, 0)], ids], cache

    return decode_loop(
        forward,
        cache,
        batch,
        sampling,
        num_steps,
        leave_early,
        vocab_size=VOCAB_SIZE,
        max_steps=MAX_STEPS,
        speculation=speculation,
    )


def prefilled(rows: list[Row]) -> np.ndarray:
    """A cache with all but the last token of each prompt."""
    cache = np.full((ROWS, WIDTH), -1, np.int32)
    for place, row in enumerate(rows):
        cache[place, : len(row.prompt) - 1] = row.prompt[:-1]
    return cache


def make_batch(rows: list[Row], outputs: list[Output]) -> DecodeBatch:
    """The next call of rows that got these outputs."""
    history = np.full((ROWS, WIDTH), VOCAB_SIZE, np.int32)
    every = [[*row.prompt, *output.tokens] for row, output in zip(rows, outputs, strict=True)]
    for place, ids in enumerate(every):
        history[place, : len(ids)] = ids
    return DecodeBatch(
        last=np.array([ids[-1] for ids in every], np.int32),
        cached=np.array([len(ids) - 1 for ids in every], np.int32),
        num_generated=np.array([len(output.tokens) for output in outputs], np.int32),
        is_active=np.array([output.finish == RUNNING for output in outputs]),
        table=np.zeros((ROWS, 1), np.int32),
        history=history,
        mask=np.full((ROWS, 1), -1, np.int32),
    )


def generate(
    weights: np.ndarray, rows: list[Row], speculation: Speculation | None, *, seed: int = 0, leave_early: bool = False
) -> tuple[list[Output], int, np.ndarray]:
    """Calls of drawn sizes until all rows have ended; what they got, the steps, and the cache."""
    drawn = random.Random(seed)
    sampling = sampling_batch([row.sampling for row in rows], VOCAB_SIZE, ROWS)
    outputs = [Output([], RUNNING, []) for _ in rows]
    cache, num_steps = prefilled(rows), 0
    for _ in range(200):
        most = drawn.choice([1, 2, 5, MAX_STEPS])
        batch = make_batch(rows, outputs)
        if speculation is not None:
            batch = batch._replace(max_new=np.full((ROWS,), most, np.int32))
        cache, report = jax.device_get(call(weights, cache, batch, sampling, most, leave_early, speculation))
        assert report.num_new.max() <= most
        num_steps += report.num_steps
        for place, output in enumerate(outputs):
            if output.finish != RUNNING:
                assert report.num_new[place] == 0
                continue
            count, finish = int(report.num_new[place]), int(report.finish[place])
            assert count
            new = report.tokens[place, :count].tolist()
            if finish == STOPPED and new[-1] not in rows[place].sampling.stop_ids:
                finish = RUNNING  # It only paused.
            logprobs = StepLogprobs(*(leaf[place, :count] for leaf in report.logprobs))
            outputs[place] = Output([*output.tokens, *new], finish, [*output.logprobs, logprobs])
        if all(output.finish != RUNNING for output in outputs):
            return outputs, num_steps, cache
    raise AssertionError("it does not end")


def draw_rows(seed: int) -> tuple[np.ndarray, list[Row]]:
    """A model whose outputs often repeat, and rows with all kinds of parameters."""
    numbers = np.random.default_rng(seed)
    weights = numbers.normal(0, 3, (VOCAB_SIZE,) * 3).astype(np.float32)
    drawn = random.Random(seed)
    rows = []
    for index in range(ROWS):
        prompt = [drawn.randrange(4) for _ in range(drawn.randint(1, 30))]
        params = SamplingParams(
            temperature=drawn.choice([0.0, 0.0, 0.3, 1.0]),
            top_k=drawn.choice([0, 0, 3]),
            top_p=drawn.choice([1.0, 0.9]),
            repetition_penalty=drawn.choice([1.0, 1.0, 1.3]),
            frequency_penalty=drawn.choice([0.0, 0.0, 0.4]),
            logit_bias=drawn.choice([None, {5: 4.0}]),
            min_tokens=drawn.choice([0, 9]),
            max_tokens=60,
            logprobs=drawn.choice([None, 2]),
        )
        stops = tuple(drawn.sample(range(VOCAB_SIZE), drawn.choice([0, 0, 1])))
        pause = drawn.choice([-1, drawn.randrange(VOCAB_SIZE)])
        rows.append(Row(prompt, SamplingRow(params, drawn.choice([1, 12, 60]), (seed, index), stops, pause)))
    return weights, rows


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31 - 1), st.booleans())
def test_guesses_change_nothing_of_what_comes_out(seed: int, leave_early: bool) -> None:
    weights, rows = draw_rows(seed)
    plain, plain_steps, _ = generate(weights, rows, None, seed=1)
    found, num_steps, cache = generate(weights, rows, FOUR, seed=2, leave_early=leave_early)
    for row, want, got, cached in zip(rows, plain, found, cache, strict=True):
        assert (got.tokens, got.finish) == (want.tokens, want.finish)
        for mine, theirs in zip(zip(*got.logprobs, strict=True), zip(*want.logprobs, strict=True), strict=True):
            np.testing.assert_array_equal(np.concatenate(mine), np.concatenate(theirs))
        # All but the last token are cached, each in its place.
        ids = [*row.prompt, *got.tokens]
        assert cached[: len(ids) - 1].tolist() == ids[:-1]
    assert num_steps <= plain_steps


def repeating(max_tokens: list[int]) -> tuple[np.ndarray, list[Row]]:
    """A model that counts 0, 1, ... 5 and starts over, and rows that may get the given numbers of tokens."""
    weights = np.zeros((VOCAB_SIZE,) * 3, np.float32)
    for token in range(6):
        weights[:, token, (token + 1) % 6] = 9.0
    params = SamplingParams(temperature=0.0, max_tokens=60)
    prompt = [*range(6), *range(3)]
    return weights, [Row(prompt, SamplingRow(params, count, (0, 0), ())) for count in max_tokens]


def call_once(weights: np.ndarray, rows: list[Row], max_new: list[int]) -> tuple[np.ndarray, Report]:
    """One call with guesses; the cache and the report."""
    batch = make_batch(rows, [Output([], RUNNING, [])] * ROWS)._replace(max_new=np.array(max_new, np.int32))
    sampling = sampling_batch([row.sampling for row in rows], VOCAB_SIZE, ROWS)
    return jax.device_get(call(weights, prefilled(rows), batch, sampling, MAX_STEPS, False, FOUR))


def test_what_repeats_takes_a_fifth_of_the_steps_and_what_became_of_guesses_is_counted() -> None:
    weights, rows = repeating([60, 7, 1])
    _, report = call_once(weights, rows, [15] * ROWS)
    assert report.num_steps == 3
    assert report.num_new.tolist() == [15, 7, 1]
    assert report.finish.tolist() == [RUNNING, FULL, FULL]
    assert report.tokens[0, :15].tolist() == [(3 + step) % 6 for step in range(15)]
    # No more is guessed than a row may get: two tokens after its first five, and none for the last row.
    assert report.drafts.steps.tolist() == [3, 2, 1]
    assert report.drafts.drafted.tolist() == [[3] * 4, [2, 1, 1, 1], [0] * 4]
    assert report.drafts.accepted.tolist() == report.drafts.drafted.tolist()


def test_a_row_gets_no_more_than_it_has_pages_for_and_the_call_ends_there() -> None:
    weights, rows = repeating([60] * ROWS)
    max_new = [7, 9, 12]
    cache, report = call_once(weights, rows, max_new)
    assert report.num_new.tolist() == [7, 9, 10]
    for row, cached, most, count in zip(rows, cache, max_new, report.num_new, strict=True):
        # Nothing is written past the room that the row has.
        before = len(row.prompt) - 1
        assert (cached[before + most :] == -1).all()
        assert (cached[: before + count] >= 0).all()


def test_a_row_with_a_mask_gets_one_token_and_the_others_theirs() -> None:
    weights, rows = repeating([60] * ROWS)
    batch = make_batch(rows, [Output([], RUNNING, [])] * ROWS)
    batch = batch._replace(mask=np.array([[1 << 9], [-1], [-1]], np.int32), max_new=np.array([1, 5, 5], np.int32))
    sampling = sampling_batch([row.sampling for row in rows], VOCAB_SIZE, ROWS)
    _, report = jax.device_get(call(weights, prefilled(rows), batch, sampling, 1, False, FOUR))
    assert report.num_new.tolist() == [1, 5, 5]
    assert report.tokens[0, 0] == 9
    assert report.tokens[1, :5].tolist() == [3, 4, 5, 0, 1]


@pytest.mark.parametrize("mark", [3, 5])
def test_a_row_pauses_in_the_middle_of_guesses_that_are_right(mark: int) -> None:
    weights, rows = repeating([20] * ROWS)
    paused = [row._replace(sampling=row.sampling._replace(pause_id=mark)) for row in rows]
    want, _, _ = generate(weights, paused, None)
    got, _, _ = generate(weights, paused, FOUR)
    assert [output.tokens for output in got] == [output.tokens for output in want]


def take_step(
    rows: list[Row], max_new: list[int] | None, speculation: Speculation | None
) -> tuple[RowState, Callable[[RowState, Array, bool], tuple[RowState, Array, Array]]]:
    """The state before a call of new rows, and a step: the state after it, the lengths in it, and who leaves after it."""
    batch = make_batch(rows, [Output([], RUNNING, []) for _ in rows])
    batch = batch._replace(max_new=None if max_new is None else np.array(max_new, np.int32))
    sampling = sampling_batch([row.sampling for row in rows], VOCAB_SIZE, ROWS)

    @jax.jit
    def step(
        state: RowState, logits: Float[Array, "B T V"], leave_early: bool, batch: DecodeBatch, sampling: SamplingBatch
    ) -> tuple[RowState, Array, Array]:
        tokens = next_tokens(state, batch, sampling, speculation)
        after = verify_tokens(state, logits, tokens, batch, sampling)
        return after, place_tokens(state, batch, tokens).lengths, leaving_rows(after, batch, leave_early)

    begun = begin_rows(
        jax.tree.map(jnp.asarray, batch), vocab_size=VOCAB_SIZE, max_steps=MAX_STEPS, speculation=speculation
    )
    return begun, lambda state, logits, leave_early: step(state, logits, leave_early, batch, sampling)


def test_a_row_that_has_all_it_may_get_of_a_call_does_nothing_in_a_later_step() -> None:
    """A loop that hears of it one step late takes that step."""
    rows = [Row([3, 4] * 4, SamplingRow(SamplingParams(temperature=0), 9, (0, 0), ())) for _ in range(ROWS)]
    state, take = take_step(rows, [1, 3, 6], FOUR)
    for step in range(1, 5):
        # A token that has not been there before, so that no guess is right.
        logits = jnp.zeros((ROWS, FOUR.width, VOCAB_SIZE)).at[:, :, 5 + step].set(1)
        state, lengths, leaving = take(state, logits, False)
        assert state.report.num_new.tolist() == [1, min(step, 3), step]
        assert [bool(length) for length in lengths] == [step <= 1, step <= 3, True]
        assert leaving.tolist() == [True, step >= 3, False]
    assert state.report.finish.tolist() == [RUNNING] * ROWS
    assert state.report.drafts.steps.tolist() == [1, 3, 4]


@pytest.mark.parametrize("leave_early", [False, True])
def test_a_row_that_has_ended_ends_the_call_where_others_wait(leave_early: bool) -> None:
    rows = [Row([3, 4], SamplingRow(SamplingParams(temperature=0), most, (0, 0), ())) for most in (1, 2, 3)]
    state, take = take_step(rows, None, None)
    state, _, leaving = take(state, jnp.zeros((ROWS, 1, VOCAB_SIZE)), leave_early)
    assert state.report.finish.tolist() == [FULL, RUNNING, RUNNING]
    assert leaving.tolist() == [leave_early, False, False]
