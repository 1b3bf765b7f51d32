"""Continuous batching: who joins, leaves and is aborted while others run, and that nobody's output shows it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from step3_jax.cache.paged import page_bytes
from step3_jax.engine.engine import Engine
from step3_jax.engine.job import Job
from step3_jax.engine.llm import LLM
from step3_jax.engine.request import Prompt, Request
from step3_jax.engine.runner import Runner
from step3_jax.engine.state import PrefillBatch
from step3_jax.sampling.params import SamplingParams
from step3_jax.text.tokenizer import Tokenizer

EOT = 257
LONG = list(range(20, 200))
PROMPTS = [[1, 2, 3], LONG, [77], list(range(10, 40)), [9] * 70]


def greedy(max_tokens: int, **values: object) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **values)


def make_engine(runner: Runner, **values: object) -> Engine:
    settings = {"max_model_len": 256, "eos_ids": (EOT,), "max_batch_size": 32, "max_num_batched_tokens": 64}
    return Engine(runner, None, **(settings | values))


def request(index: int, max_tokens: int, **values: object) -> Request:
    return Request(index, Prompt(tuple(PROMPTS[index % len(PROMPTS)])), greedy(max_tokens, **values), 0)


def ids(job: Job) -> tuple[int, ...]:
    return job.output().outputs[0].token_ids


@pytest.fixture(scope="module")
def alone(llm: LLM) -> list[tuple[int, ...]]:
    """What each prompt gets by itself, read whole."""
    return [llm.generate(prompt, greedy(20))[0].outputs[0].token_ids for prompt in PROMPTS]


def test_requests_join_and_leave_while_others_run_and_get_what_they_get_alone(
    runner: Runner, alone: list[tuple[int, ...]]
) -> None:
    engine = make_engine(runner)
    lengths = [20, 3, 11, 20, 5]
    jobs: list[Job] = []
    sizes = []
    while len(jobs) < len(lengths) or engine.has_work:
        # One more each round, with pieces of two tokens, so that all kinds of company come about.
        if len(jobs) < len(lengths):
            jobs.append(engine.add(request(len(jobs), lengths[len(jobs)]), steps_per_piece=2))
        engine.step()
        sizes.append(engine.num_running)
    assert [ids(job) for job in jobs] == [made[:count] for made, count in zip(alone, lengths, strict=True)]
    assert max(sizes) >= 3
    assert engine.allocator.num_free == engine.allocator.num_pages
    assert engine.stats.num_requests == len(jobs)
    assert engine.stats.num_generated_tokens == sum(lengths)


def test_a_short_request_ends_while_a_long_one_that_came_first_runs_on(runner: Runner) -> None:
    engine = make_engine(runner)
    long, short = engine.add(request(0, 20), steps_per_piece=2), engine.add(request(2, 3), steps_per_piece=2)
    while not short.is_done:
        engine.step()
    assert not long.is_done
    late = engine.add(request(3, 2), steps_per_piece=2)
    while not late.is_done:
        engine.step()
    assert not long.is_done
    engine.abort(long)
    assert not engine.has_work


def test_rows_decode_while_a_long_prompt_is_read(runner: Runner) -> None:
    engine = make_engine(runner)
    first = engine.add(request(0, 20))
    engine.step()
    made = len(first.rows[0].made)
    long = engine.add(request(1, 2))
    engine.step()
    engine.step()
    # Of 179 tokens two chunks of 64 are read, and each round gave the other one token.
    assert long.rows[0].num_read == 128
    assert len(first.rows[0].made) == made + 2


def test_who_does_not_fit_waits_for_pages_and_gets_the_same(runner: Runner, alone: list[tuple[int, ...]]) -> None:
    page = page_bytes(runner.config.text, "float32")
    engine = make_engine(runner, kv_cache_memory_bytes=4 * page)
    jobs = [engine.add(request(index, 20)) for index in range(3)]
    engine.step()
    # The second needs all four pages; it waits until it is alone, and the third waits behind it.
    assert (engine.num_running, engine.num_waiting) == (1, 2)
    while engine.has_work:
        engine.step()
    assert [ids(job) for job in jobs] == alone[:3]
    assert engine.allocator.num_free == 4


def test_an_abandoned_stream_frees_its_pages(runner: Runner) -> None:
    llm = LLM.from_model(runner)
    allocator = llm._engine.allocator
    stream = llm.generate([PROMPTS[0], PROMPTS[3]], greedy(20), stream=True)
    assert allocator.num_free == allocator.num_pages, "what nobody reads from takes nothing"
    next(stream)
    assert allocator.num_free < allocator.num_pages
    stream.close()
    assert allocator.num_free == allocator.num_pages
    assert not llm._engine.has_work


def test_streams_read_in_turn_are_what_each_is_alone(runner: Runner, alone: list[tuple[int, ...]]) -> None:
    llm = LLM.from_model(runner)
    streams = [llm.generate(PROMPTS[index], greedy(20), stream=True) for index in (0, 3)]
    found: list[tuple[int, ...]] = [(), ()]
    open_streams = [0, 1]
    while open_streams:
        for index in tuple(open_streams):
            piece = next(streams[index], None)
            if piece is None:
                open_streams.remove(index)
            else:
                found[index] += piece.token_ids
    assert found == [alone[0], alone[3]]


def test_a_failed_round_loses_its_jobs_and_the_engine_goes_on(
    runner: Runner, alone: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM.from_model(runner)
    stream = llm.generate(PROMPTS[0], greedy(20), stream=True)
    next(stream)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Runner, "decode", interrupt)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS[3], greedy(20))
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="give the prompts again"):
        list(stream)
    assert llm.generate(PROMPTS[0], greedy(20))[0].outputs[0].token_ids == alone[0]


def test_penalties_and_logprobs_go_on_across_calls(runner: Runner) -> None:
    """Counts are made anew from the history at each call, so the number of calls must not matter."""
    params = SamplingParams(
        temperature=0, max_tokens=12, ignore_eos=True, frequency_penalty=1.5, repetition_penalty=1.2, logprobs=2
    )
    found = []
    for steps in (1, 32):
        engine = make_engine(runner)
        job = engine.add(Request(0, Prompt((5, 5, 6, 7)), params, 0), steps_per_piece=steps)
        while engine.has_work:
            engine.step()
        found.append(job.output().outputs[0])
    assert found[0].token_ids == found[1].token_ids
    assert found[0].cumulative_logprob == pytest.approx(found[1].cumulative_logprob, abs=1e-5)
    assert len(set(found[0].token_ids)) > 6, "with such penalties tokens do not repeat"


def test_pictures_cut_by_a_chunk_are_read_as_a_whole(llm: LLM, runner: Runner, tokenizer: Tokenizer) -> None:
    """Two prompts with pictures in chunks of 10 tokens: places of one picture fall into several chunks."""
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)) for _ in range(2)]
    prompts = [
        llm.prompts.from_text("abcd<im_patch>e<im_patch>f", pictures),
        llm.prompts.from_text("x<im_patch>yz", pictures[1:]),
    ]
    want = [
        llm.generate(text, greedy(4), images=own)[0].outputs[0].token_ids
        for text, own in (("abcd<im_patch>e<im_patch>f", pictures), ("x<im_patch>yz", pictures[1:]))
    ]
    engine = make_engine(runner, max_num_batched_tokens=10)
    outputs = engine.generate([Request(index, prompt, greedy(4), 0) for index, prompt in enumerate(prompts)])
    assert [output.outputs[0].token_ids for output in outputs] == want


@pytest.mark.parametrize("kv_cache_dtype", ["bfloat16", "fp8"])
def test_other_formats_of_the_cache_serve(runner: Runner, alone: list[tuple[int, ...]], kv_cache_dtype: str) -> None:
    engine = make_engine(runner, kv_cache_dtype=kv_cache_dtype)
    [output] = engine.generate([request(3, 20)])
    made = output.outputs[0].token_ids
    assert len(made) == 20
    # Random weights: rounding soon leads elsewhere.
    assert made[0] == alone[3][0]


def test_memory_of_a_chunk_does_not_grow_with_what_is_cached(runner: Runner) -> None:
    """The same chunk against caches of 1,024 and 16,384 tokens: attention over all of them at once would take 31 MB."""

    def temporary_bytes(num_pages: int) -> int:
        cache = jax.eval_shape(lambda: runner.allocate_cache(num_pages, "float32"))
        batch = PrefillBatch(
            jnp.zeros((256,), jnp.int32),
            jnp.asarray([0, 256]),
            jnp.asarray([num_pages * 64]),
            jnp.zeros((1, num_pages), jnp.int32),
        )
        return runner.prefill_program(cache, batch).memory_analysis().temp_size_in_bytes

    short, long = temporary_bytes(16), temporary_bytes(256)
    assert long < short + 2**20
