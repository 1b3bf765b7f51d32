"""Guesses through the Python API: the same outputs in fewer steps, whatever runs beside them."""

from __future__ import annotations

import concurrent.futures
import re

import jax
import numpy as np
import pytest

from step3_jax import resources
from step3_jax.engine.llm import LLM
from step3_jax.engine.runner import Runner
from step3_jax.engine.state import DecodeBatch
from step3_jax.layout.page import page_bytes
from step3_jax.sampling.batch import SamplingRow, sampling_batch
from step3_jax.sampling.params import SamplingParams
from step3_jax.sampling.speculation import Speculation
from step3_jax.sampling.structured import StructuredOutputsParams
from step3_jax.text.tokenizer import Tokenizer
from tests.unit.engine.conftest import VOCAB_SIZE
from tests.unit.engine.test_llm import MIXED, check_same_logprobs, ids

NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 1}
PROMPTS = [[1, 2, 3] * 6, [4, 9, 33, 7, 8], list(range(10, 40)) * 2, [77]]
GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logprobs=2)
DRAWN = SamplingParams(temperature=0.4, top_k=4, seed=3, max_tokens=40, ignore_eos=True, logprobs=2)


@pytest.fixture(scope="module")
def guessing(runner: Runner, tokenizer: Tokenizer) -> LLM:
    return LLM.from_model(runner, tokenizer, max_num_seqs=4, speculative_config=NGRAM)


@pytest.fixture(scope="module")
def plain(runner: Runner, tokenizer: Tokenizer) -> LLM:
    return LLM.from_model(runner, tokenizer, max_num_seqs=4)


@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "seeded"])
def test_the_outputs_are_those_without_guesses_alone_and_in_company(
    guessing: LLM, plain: LLM, params: SamplingParams
) -> None:
    before = guessing.stats.num_accepted_tokens, guessing.stats.num_decode_steps, plain.stats.num_decode_steps
    want = plain.generate(PROMPTS, params)
    found = guessing.generate(PROMPTS, params)
    assert ids(found) == ids(want)
    for mine, theirs in zip(found, want, strict=True):
        assert mine.outputs[0].finish_reason == theirs.outputs[0].finish_reason
        check_same_logprobs(mine.outputs[0].logprobs, theirs.outputs[0].logprobs)
    stats = guessing.stats
    assert stats.num_accepted_tokens > before[0], "nothing was guessed right: the test shows nothing"
    assert stats.num_decode_steps - before[1] < plain.stats.num_decode_steps - before[2]
    assert [ids(guessing.generate(prompt, params))[0] for prompt in PROMPTS] == ids(want)


def test_penalties_ends_and_biases_hold_for_each_token(guessing: LLM, plain: LLM) -> None:
    assert ids(guessing.generate(PROMPTS, MIXED)) == ids(plain.generate(PROMPTS, MIXED))
    free = plain.generate(PROMPTS[0], GREEDY)[0].outputs[0]
    # The token that ends it is guessed like any other.
    stop = SamplingParams(temperature=0, max_tokens=40, stop_token_ids=[free.token_ids[9]])
    want, found = (llm.generate(PROMPTS[0], stop)[0].outputs[0] for llm in (plain, guessing))
    assert (found.token_ids, found.finish_reason) == (want.token_ids, want.finish_reason)
    assert found.finish_reason == "stop"


def test_what_was_preempted_or_found_in_the_prefix_cache_goes_on_the_same(
    runner: Runner, plain: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("step3_jax.layout.admission.RESERVED_OUTPUT", 8)
    monkeypatch.setattr("step3_jax.layout.admission.GROWTH_PAGES", 1)
    memory = 7 * page_bytes(runner.config.text, "float32")
    llm = LLM.from_model(
        runner, max_num_seqs=4, max_model_len=256, kv_cache_memory_bytes=memory, speculative_config=NGRAM
    )
    prompts = [[*range(30, 120), *end] for end in ([1, 2, 1, 2], [3], [1, 2, 1, 2], [9, 9])]
    params = SamplingParams(temperature=0.3, seed=8, max_tokens=100, ignore_eos=True)
    want = [ids(plain.generate(prompt, params))[0] for prompt in prompts]
    assert ids(llm.generate(prompts, params)) == want
    assert llm.stats.num_preemptions > 0
    assert llm.stats.num_accepted_tokens > 0
    assert ids(llm.generate(prompts, params)) == want
    assert llm.stats.prefix_cache_hits > 0


def test_a_sequence_goes_to_the_end_of_the_context(runner: Runner, plain: LLM) -> None:
    llm = LLM.from_model(runner, max_num_seqs=1, max_model_len=128, speculative_config=NGRAM)
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    found = llm.generate([5, 6] * 30, params)[0].outputs[0]
    assert (len(found.token_ids), found.finish_reason) == (68, "length")
    limited = SamplingParams(temperature=0, max_tokens=68, ignore_eos=True)
    assert found.token_ids == plain.generate([5, 6] * 30, limited)[0].outputs[0].token_ids


def test_a_stream_has_no_longer_pieces_and_threads_share_calls(guessing: LLM, plain: LLM) -> None:
    want = ids(plain.generate(PROMPTS, GREEDY))
    pieces = list(guessing.generate(PROMPTS[0], GREEDY, stream=True))
    assert max(len(piece.token_ids) for piece in pieces) <= guessing.engine_config.stream_interval
    assert tuple(token for piece in pieces for token in piece.token_ids) == want[0]
    with concurrent.futures.ThreadPoolExecutor(len(PROMPTS)) as pool:
        found = list(pool.map(lambda prompt: ids(guessing.generate(prompt, GREEDY))[0], PROMPTS))
    assert found == want


def test_nothing_is_guessed_for_an_output_that_must_have_a_form() -> None:
    pytest.importorskip("llguidance", reason="the extra grammar is not installed")
    folder = resources.find("models/step3-tiny")
    llm = LLM(folder, max_model_len=256, max_num_seqs=1, speculative_config=NGRAM)
    form = SamplingParams(temperature=0, max_tokens=24, structured_outputs=StructuredOutputsParams(regex="(ab){12}"))
    assert llm.generate("ab" * 12, form)[0].outputs[0].text == "ab" * 12
    assert llm.stats.num_draft_tokens == 0


@pytest.mark.parametrize("num_rows", [1, 4])
def test_no_copy_of_the_cache_is_in_the_loop_with_guesses(runner: Runner, num_rows: int) -> None:
    num_pages, width = 37, 8
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
