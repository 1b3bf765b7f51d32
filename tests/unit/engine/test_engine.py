"""Continuous batching: requests join, leave and are aborted while others run, and no output shows it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from step3_jax.engine.config import EngineConfig
from step3_jax.engine.core import EngineCore
from step3_jax.engine.llm import LLM
from step3_jax.engine.request import Prompt, Request, SequenceOutput
from step3_jax.engine.runner import Runner
from step3_jax.engine.state import PrefillBatch
from step3_jax.layout.page import page_bytes
from step3_jax.sampling.params import SamplingParams
from step3_jax.text.tokenizer import Tokenizer

EOT = 257
LONG = list(range(20, 200))
PROMPTS = [[1, 2, 3], LONG, [77], list(range(10, 40)), [9] * 70]


def greedy(max_tokens: int, **values: object) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **values)


class Sink(list[SequenceOutput]):
    """All outputs of a request."""

    put = list.append

    def ids(self, index: int = 0) -> tuple[int, ...]:
        return sum((output.token_ids for output in self if output.index == index), ())

    @property
    def is_done(self) -> bool:
        return any(output.finish for output in self)


def make_core(runner: Runner, **values: object) -> EngineCore:
    settings = {
        "max_num_seqs": 32,
        "max_num_batched_tokens": 64,
        "max_call_ms": 10_000.0,
        "enable_prefix_caching": False,
    }
    return EngineCore(runner, EngineConfig(**(settings | values)), max_model_len=256, eos_ids=(EOT,))


def request(index: int, max_tokens: int, steps: int = 32, **values: object) -> Request:
    prompt = Prompt(tuple(PROMPTS[index % len(PROMPTS)]))
    return Request(f"request {index}", prompt, greedy(max_tokens, **values), 0, steps)


def add(core: EngineCore, one: Request) -> Sink:
    sink = Sink()
    core.add(one, sink)
    return sink


def run(core: EngineCore) -> None:
    while core.has_work:
        core.step()


@pytest.fixture(scope="module")
def alone(llm: LLM) -> list[tuple[int, ...]]:
    """What each prompt gets by itself, in one chunk."""
    return [llm.generate(prompt, greedy(20))[0].outputs[0].token_ids for prompt in PROMPTS]


def test_requests_join_and_leave_while_others_run_and_get_what_they_get_alone(
    runner: Runner, alone: list[tuple[int, ...]]
) -> None:
    core = make_core(runner)
    lengths = [20, 3, 11, 20, 5]
    sinks: list[Sink] = []
    sizes = []
    while len(sinks) < len(lengths) or core.has_work:
        # One more each round, with pieces of two tokens, so that all kinds of combinations occur.
        if len(sinks) < len(lengths):
            sinks.append(add(core, request(len(sinks), lengths[len(sinks)], steps=2)))
        core.step()
        sizes.append(core.num_running)
    assert [sink.ids() for sink in sinks] == [ids[:count] for ids, count in zip(alone, lengths, strict=True)]
    assert max(sizes) >= 3
    assert core.allocator.num_free == core.allocator.num_pages
    assert core.stats.num_requests == len(sinks)
    assert core.stats.num_generated_tokens == sum(lengths)


def test_a_short_request_ends_while_a_long_one_that_came_first_runs_on(runner: Runner) -> None:
    core = make_core(runner)
    long, short = add(core, request(0, 20, steps=2)), add(core, request(2, 3, steps=2))
    while not short.is_done:
        core.step()
    assert not long.is_done
    late = add(core, request(3, 2, steps=2))
    while not late.is_done:
        core.step()
    assert not long.is_done
    core.abort("request 0")
    core.step()
    assert (core.has_work, long[-1].finish) == (False, "aborted")


def test_others_decode_while_a_long_prompt_is_prefilled(runner: Runner) -> None:
    core = make_core(runner)
    first = add(core, request(0, 20, steps=2))
    core.step()
    before = len(first.ids())
    long = add(core, request(1, 2))
    while not long:
        core.step()
    # 179 tokens in three chunks of 64, and each round gave the other one token; a call of two was under way.
    assert before + 5 <= len(first.ids()) <= before + 6


def test_what_does_not_fit_waits_for_pages_and_gets_the_same(runner: Runner, alone: list[tuple[int, ...]]) -> None:
    page = page_bytes(runner.config.text, "float32")
    core = make_core(runner, kv_cache_memory_bytes=4 * page)
    sinks = [add(core, request(index, 20)) for index in range(3)]
    core.step()
    # The second needs all four pages; the third, which is small, passes it.
    assert (core.num_running, core.num_waiting) == (2, 1)
    run(core)
    assert [sink.ids() for sink in sinks] == alone[:3]
    assert core.allocator.num_free == 4


def test_an_abandoned_stream_frees_its_pages(runner: Runner) -> None:
    llm = LLM.from_model(runner)
    allocator = llm._engine.core.allocator
    stream = llm.generate([PROMPTS[0], PROMPTS[3]], greedy(20), stream=True)
    assert allocator.num_free == allocator.num_pages, "what is never read from takes nothing"
    next(stream)
    assert allocator.num_free < allocator.num_pages
    stream.close()
    assert allocator.num_free == allocator.num_pages
    assert not llm._engine.core.has_work


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


def test_an_interrupted_call_loses_nothing_and_the_engine_goes_on(
    runner: Runner, alone: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM.from_model(runner)
    stream = llm.generate(PROMPTS[0], greedy(20), stream=True)
    first = next(stream)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Runner, "decode", interrupt)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS[3], greedy(20))
    monkeypatch.undo()
    assert first.token_ids + sum((piece.token_ids for piece in stream), ()) == alone[0]
    assert llm.generate(PROMPTS[0], greedy(20))[0].outputs[0].token_ids == alone[0]


def test_penalties_and_logprobs_go_on_across_calls(runner: Runner) -> None:
    """Counts are recomputed from the history at each call, so the number of calls must not matter."""
    params = SamplingParams(
        temperature=0, max_tokens=12, ignore_eos=True, frequency_penalty=1.5, repetition_penalty=1.2, logprobs=2
    )
    found = []
    for steps in (1, 32):
        core = make_core(runner)
        sink = add(core, Request("one", Prompt((5, 5, 6, 7)), params, 0, steps))
        run(core)
        chosen = np.concatenate([output.logprobs.chosen for output in sink if output.logprobs is not None])
        found.append((sink.ids(), chosen))
    assert found[0][0] == found[1][0]
    np.testing.assert_allclose(found[0][1], found[1][1], atol=1e-5)
    assert len(set(found[0][0])) > 6, "with such penalties tokens do not repeat"


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
    core = make_core(runner, max_num_batched_tokens=10)
    sinks = [add(core, Request(str(index), prompt, greedy(4), 0)) for index, prompt in enumerate(prompts)]
    run(core)
    assert [sink.ids() for sink in sinks] == want


@pytest.mark.parametrize("kv_cache_dtype", ["bfloat16", "fp8"])
def test_other_formats_of_the_cache_serve(runner: Runner, alone: list[tuple[int, ...]], kv_cache_dtype: str) -> None:
    core = make_core(runner, kv_cache_dtype=kv_cache_dtype)
    sink = add(core, request(3, 20))
    run(core)
    assert len(sink.ids()) == 20
    # Random weights: rounding soon makes them diverge.
    assert sink.ids()[0] == alone[3][0]


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
