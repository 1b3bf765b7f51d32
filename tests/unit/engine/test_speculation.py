"""Guesses through the Python API: the same outputs in fewer steps, whatever runs beside them."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import re

import jax
import numpy as np
import pytest

from step3_jax.engine.llm import LLM
from step3_jax.engine.runner import Runner
from step3_jax.engine.state import DecodeBatch
from step3_jax.layout.page import page_bytes
from step3_jax.sampling.batch import SamplingRow, sampling_batch
from step3_jax.sampling.params import SamplingParams
from step3_jax.sampling.speculation import Speculation
from step3_jax.text.tokenizer import Tokenizer
from tests.unit.engine.conftest import VOCAB_SIZE
from tests.unit.engine.test_llm import MIXED, check_same_logprobs, ids

NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 1}
PROMPTS = [[1, 2, 3] * 6, [4, 9, 33, 7, 8], list(range(10, 40)) * 2, [77]]
GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logprobs=2)
DRAWN = SamplingParams(temperature=0.4, top_k=4, seed=3, max_tokens=40, ignore_eos=True, logprobs=2)


@pytest.fixture(scope="module")
def guessing(runner: Runner, tokenizer: Tokenizer) -> LLM:
    """With a cache so small that long sequences preempt each other."""
    memory = 7 * page_bytes(runner.config.text, "float32")
    return LLM.from_model(runner, tokenizer, max_num_seqs=4, kv_cache_memory_bytes=memory, speculative_config=NGRAM)


@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "seeded"])
def test_the_outputs_are_those_without_guesses(guessing: LLM, llm: LLM, params: SamplingParams) -> None:
    before = guessing.stats.num_accepted_tokens, guessing.stats.num_decode_steps, llm.stats.num_decode_steps
    want = llm.generate(PROMPTS, params)
    found = guessing.generate(PROMPTS, params)
    assert ids(found) == ids(want)
    for mine, theirs in zip(found, want, strict=True):
        assert mine.outputs[0].finish_reason == theirs.outputs[0].finish_reason
        check_same_logprobs(mine.outputs[0].logprobs, theirs.outputs[0].logprobs)
    stats = guessing.stats
    assert stats.num_accepted_tokens > before[0], "nothing was guessed right: the test shows nothing"
    assert stats.num_decode_steps - before[1] < llm.stats.num_decode_steps - before[2]


@pytest.mark.slow
@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "seeded"])
def test_a_sequence_alone_gets_what_it_gets_in_company(guessing: LLM, params: SamplingParams) -> None:
    """Programs of other sizes are compiled, here and below."""
    together = ids(guessing.generate(PROMPTS, params))
    assert [ids(guessing.generate(prompt, params))[0] for prompt in PROMPTS] == together


@pytest.mark.slow
def test_penalties_ends_and_biases_hold_for_each_token(guessing: LLM, llm: LLM) -> None:
    assert ids(guessing.generate(PROMPTS, MIXED)) == ids(llm.generate(PROMPTS, MIXED))
    free = llm.generate(PROMPTS[0], GREEDY)[0].outputs[0]
    # The token that ends it is guessed like any other.
    stop = SamplingParams(temperature=0, max_tokens=40, stop_token_ids=[free.token_ids[9]])
    want, found = (one.generate(PROMPTS[0], stop)[0].outputs[0] for one in (llm, guessing))
    assert (found.token_ids, found.finish_reason) == (want.token_ids, want.finish_reason)
    assert found.finish_reason == "stop"


@pytest.mark.slow
def test_what_was_preempted_or_found_in_the_prefix_cache_goes_on_the_same(
    guessing: LLM, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("step3_jax.layout.admission.RESERVED_OUTPUT", 8)
    monkeypatch.setattr("step3_jax.layout.admission.GROWTH_PAGES", 1)
    prompts = [[*range(30, 120), *end] for end in ([1, 2, 1, 2], [3], [1, 2, 1, 2], [9, 9])]
    params = SamplingParams(temperature=0.3, seed=8, max_tokens=100, ignore_eos=True)
    want = ids(llm.generate(prompts, params))
    before = dataclasses.replace(guessing.stats)
    assert ids(guessing.generate(prompts, params)) == want
    assert guessing.stats.num_preemptions > before.num_preemptions
    assert guessing.stats.num_accepted_tokens > before.num_accepted_tokens
    assert ids(guessing.generate(prompts, params)) == want
    assert guessing.stats.prefix_cache_hits > before.prefix_cache_hits


@pytest.mark.slow
def test_a_sequence_goes_to_the_end_of_the_context(guessing: LLM, llm: LLM) -> None:
    params, prompt = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True), [5, 6] * 94
    want, found = (one.generate(prompt, params)[0].outputs[0] for one in (llm, guessing))
    assert (len(found.token_ids), found.finish_reason) == (68, "length")
    assert found.token_ids == want.token_ids


@pytest.mark.slow
def test_a_stream_has_no_longer_pieces_and_threads_share_calls(guessing: LLM, llm: LLM) -> None:
    want = ids(llm.generate(PROMPTS, GREEDY))
    pieces = list(guessing.generate(PROMPTS[0], GREEDY, stream=True))
    assert max(len(piece.token_ids) for piece in pieces) <= guessing.engine_config.stream_interval
    assert tuple(token for piece in pieces for token in piece.token_ids) == want[0]
    with concurrent.futures.ThreadPoolExecutor(len(PROMPTS)) as pool:
        found = list(pool.map(lambda prompt: ids(guessing.generate(prompt, GREEDY))[0], PROMPTS))
    assert found == want


@pytest.mark.slow
def test_no_copy_of_the_cache_is_in_the_loop_with_guesses(runner: Runner) -> None:
    """For one row: its step without guesses writes one row to the cache, one with guesses writes several."""
    num_rows, num_pages, width = 1, 37, 8
    cache = jax.eval_shape(lambda: runner.allocate_cache(num_pages, "float32"))
    rows = [SamplingRow(SamplingParams(temperature=0), 9, (0, 0), ())] * num_rows
    numbers = np.zeros((num_rows,), np.int32)
    batch = DecodeBatch(
        numbers,
        numbers,
        numbers,
        numbers == 0,
        np.zeros((num_rows, width), np.int32),
        np.zeros((num_rows, 64 * width), np.int32),
        max_new=numbers + 9,
    )
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        program = runner.decode_program(
            cache,
            batch,
            sampling_batch(rows, VOCAB_SIZE, num_rows),
            max_steps=16,
            speculation=Speculation(num_speculative_tokens=4),
        )
    finally:
        jax.config.update("jax_disable_most_optimizations", True)
    made = re.findall(rf"= f32\[{cache.num_pages},\S+ ([\w-]+)\(", program.as_text())
    done = {name for name in made if name not in ("parameter", "get-tuple-element")}
    assert done & {"scatter", "dynamic-update-slice"}
    assert done <= {"scatter", "dynamic-update-slice", "fusion"}, done
