"""The jitted calls: how often they are traced, and that the cache stays where it is."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from step3_jax.engine.llm import LLM
from step3_jax.engine.runner import Runner
from step3_jax.engine.state import FULL, HALTED, RUNNING, PrefillBatch
from step3_jax.model.step3 import Step3
from step3_jax.sampling.batch import SamplingBatch, SamplingMode, SamplingRow, sampling_batch
from step3_jax.sampling.params import SamplingParams

VOCAB_SIZE = 264


def make_batch(max_tokens: list[int]) -> tuple[PrefillBatch, SamplingBatch]:
    params = SamplingParams(temperature=0)
    rows = [SamplingRow(params, count, (0, 0), ()) for count in max_tokens]
    ids = jnp.asarray(np.arange(len(rows) * 32).reshape(len(rows), 32) % VOCAB_SIZE, jnp.int32)
    batch = PrefillBatch(ids, jnp.full((len(rows),), 5, jnp.int32))
    return batch, sampling_batch(rows, VOCAB_SIZE, len(rows))


def test_nothing_is_traced_twice_for_a_bucket(model: Step3) -> None:
    runner = Runner(model)
    llm = LLM.from_model(runner, stream_interval=3)

    def params(seed: int, **values: float) -> SamplingParams:
        return SamplingParams(seed=seed, max_tokens=10, ignore_eos=True, **values)

    llm.generate([[1], [2, 3]], params(1, temperature=0.5, top_k=9))
    assert runner.num_traces == {"prefill": 1, "start": 1, "decode": 1}
    compile_s = runner.compile_s
    assert compile_s > 0
    assert llm.stats.compile_s == pytest.approx(compile_s)
    # Other lengths, parameters, numbers of steps; streamed or not: all in the same bucket.
    llm.generate([[1, 2, 3], list(range(20))], [params(2, top_k=40), params(3, top_k=8, top_p=0.3)])
    list(llm.generate([[4], [5]], params(4, temperature=2.0, top_k=100), stream=True))
    assert runner.num_traces == {"prefill": 1, "start": 1, "decode": 1}
    assert runner.compile_s == compile_s
    llm.generate([[4], list(range(33))], params(5, top_k=1))
    assert runner.num_traces == {"prefill": 2, "start": 2, "decode": 1}


def test_the_cache_is_given_away_and_the_report_stays(runner: Runner) -> None:
    batch, sampling = make_batch([9])
    state, first = runner.prefill(batch, sampling, cache_length=64, mode=SamplingMode())
    after, second = runner.decode(state, sampling, np.zeros(1, bool), 4, mode=SamplingMode())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.cache))
    assert first.num_tokens.tolist() == [1]
    assert second.num_tokens.tolist() == [5]
    assert first.tokens[0, 0] == second.tokens[0, 0]
    assert after.cached.tolist() == [9]
    _, third = runner.decode(after, sampling, np.zeros(1, bool), 4, mode=SamplingMode())
    assert third.tokens[0, :5].tolist() == second.tokens[0, :5].tolist()


@pytest.mark.parametrize("num_rows", [1, 4])
def test_no_copy_of_the_cache_is_in_the_decode_loop(runner: Runner, num_rows: int) -> None:
    batch, sampling = make_batch([9] * num_rows)
    state = jax.eval_shape(
        lambda batch, sampling: runner.prefill(batch, sampling, cache_length=64, mode=SamplingMode())[0],
        batch,
        sampling,
    )
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        text = runner.decode_program(state, sampling, mode=SamplingMode()).as_text()
    finally:
        jax.config.update("jax_disable_most_optimizations", True)
    assert "while(" in text
    shape = rf"f32\[{num_rows},64,16\]"
    assert re.search(shape, text), "the cache's shape is nowhere: the test looks at the wrong program"
    copies = [line for line in text.splitlines() if re.search(rf"= {shape}\S* copy\(", line)]
    assert not copies, copies


def test_rows_end_by_themselves_and_stay_as_they_are(runner: Runner) -> None:
    batch, sampling = make_batch([2, 9, 0, 9])
    state, report = runner.prefill(batch, sampling, cache_length=64, mode=SamplingMode())
    assert report.finish.tolist() == [RUNNING, RUNNING, FULL, RUNNING]
    is_halted = np.array([False, False, False, True])
    state, report = runner.decode(state, sampling, is_halted, 100, mode=SamplingMode())
    assert report.finish.tolist() == [FULL, FULL, FULL, HALTED]
    assert report.num_tokens.tolist() == [2, 9, 0, 1]
    assert not report.tokens[2].any()
    again, report = runner.decode(state, sampling, is_halted, 100, mode=SamplingMode())
    assert report.num_tokens.tolist() == [2, 9, 0, 1]
    assert again.cached.tolist() == [6, 13, 5, 5]


def test_padding_behind_a_prompt_changes_nothing(runner: Runner) -> None:
    batch, sampling = make_batch([9])
    other = batch._replace(token_ids=batch.token_ids.at[:, 5:].set(200))
    reports = []
    for one in (batch, other):
        state, _ = runner.prefill(one, sampling, cache_length=64, mode=SamplingMode())
        reports.append(runner.decode(state, sampling, np.zeros(1, bool), 100, mode=SamplingMode())[1])
    np.testing.assert_array_equal(reports[0].tokens, reports[1].tokens)
