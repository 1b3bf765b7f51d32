"""The core over an executor that shows what it finds in its pages: whatever happens, every sequence gets its own tokens."""

from __future__ import annotations

import contextlib
import random

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from step3_jax.engine.config import EngineConfig
from step3_jax.engine.core import EngineCore
from step3_jax.engine.request import Prompt, Request, SequenceOutput
from step3_jax.layout.admission import MAX_PASSES, MAX_PREEMPTIONS
from step3_jax.layout.page import page_bytes
from step3_jax.sampling.params import SamplingParams
from step3_jax.text.images import ProcessedImage, plan
from tests.unit.engine.fake import VOCAB_SIZE, FakeExecutor, expected

PAGE = 64


class Sink(list[SequenceOutput]):
    put = list.append

    def ids(self, index: int = 0) -> tuple[int, ...]:
        return sum((output.token_ids for output in self if output.index == index), ())

    def finish(self, index: int = 0) -> str:
        return next((output.finish for output in self if output.index == index and output.finish), "")


def make_core(executor: FakeExecutor, num_pages: int = 12, max_model_len: int = 640, **values: object) -> EngineCore:
    """A core whose shards have the given number of pages each."""
    memory = num_pages * page_bytes(executor.config.text, "float32")
    given = {"max_num_seqs": 4 * executor.num_shards, "max_num_batched_tokens": 128 * executor.num_shards}
    config = EngineConfig(kv_cache_memory_bytes=memory, **(given | values))
    return EngineCore(executor, config, max_model_len=max_model_len)


def request(
    name: str, prompt: list[int], max_tokens: int = 20, steps: int = 8, n: int = 1, **values: object
) -> Request:
    params = SamplingParams(temperature=1.0, n=n, max_tokens=max_tokens, ignore_eos=True, **values)
    return Request(name, Prompt(tuple(prompt)), params, 0, steps)


def add(core: EngineCore, one: Request) -> Sink:
    sink = Sink()
    core.add(one, sink)
    return sink


def run(core: EngineCore) -> None:
    for _ in range(10_000):
        if not core.has_work:
            return
        core.step()
    raise AssertionError("it does not end")


def check_pages(core: EngineCore) -> None:
    """Every page has as many owners as sequences and groups say, and none that is written has two."""
    owners = np.zeros((core.allocator.num_pages,), int)
    held = np.zeros_like(owners)
    for sequence in core.scheduler.running:
        for page in sequence.pages:
            owners[page] += 1
    for group in core._groups.values():
        for page in group.held_pages:
            owners[page] += 1
            held[page] = 1
    assert owners.tolist() == core.allocator._owners
    for sequence in core.scheduler.running:
        for page in sequence.pages[sequence.num_computed // PAGE :]:
            assert owners[page] - held[page] == 1, "a page that two sequences may write"
        assert sequence.num_passed <= MAX_PASSES
        assert sequence.num_preemptions <= MAX_PREEMPTIONS
    assert core.allocator.num_free == int((owners == 0).sum())


def prompt_of(length: int, start: int = 0) -> list[int]:
    return [(start + 7 * place) % VOCAB_SIZE for place in range(length)]


@pytest.mark.parametrize("num_shards", [1, 3])
def test_a_prompt_that_was_there_before_is_found_up_to_its_last_whole_page(num_shards: int) -> None:
    executor = FakeExecutor(num_shards)
    core = make_core(executor)
    prompt = prompt_of(300)
    first = add(core, request("first", prompt))
    run(core)
    assert (executor.prefilled, first[-1].num_cached_tokens) == (299, 0)
    second = add(core, request("second", prompt + [1, 2, 3]))
    run(core)
    assert second[-1].num_cached_tokens == 256
    assert executor.prefilled == 299 + 302 - 256
    assert second.ids() == expected(prompt + [1, 2, 3], 20)
    assert (core.stats.prefix_cache_queries, core.stats.prefix_cache_hits) == (603, 256)
    # What was generated is found as well: 320 tokens are five pages.
    third = add(core, request("third", [*prompt, *first.ids(), 5]))
    run(core)
    assert third[-1].num_cached_tokens == 256 + 64 * (len(first.ids()) + 299 >= 320)
    other = add(core, request("other", [1, *prompt[1:]]))
    salted = add(core, Request("salted", Prompt(tuple(prompt), cache_salt="x"), other_params(), 0))
    run(core)
    assert (other[-1].num_cached_tokens, salted[-1].num_cached_tokens) == (0, 0)


def other_params() -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)


def test_without_a_prefix_cache_nothing_is_found() -> None:
    executor = FakeExecutor()
    core = make_core(executor, enable_prefix_caching=False)
    for name in ("first", "second"):
        sink = add(core, request(name, prompt_of(200)))
        run(core)
        assert sink[-1].num_cached_tokens == 0
    assert executor.prefilled == 2 * 199
    assert core.allocator.num_cached == 0


def test_completions_of_one_prompt_share_it_and_one_may_be_aborted() -> None:
    executor = FakeExecutor()
    core = make_core(executor, enable_prefix_caching=False, num_pages=40, max_num_seqs=2)
    prompt = prompt_of(150)
    sink = add(core, request("several", prompt, n=5))
    core.step()
    core.abort("several", 0)
    core.abort("several", 3)
    while core.has_work:
        core.step()
        check_pages(core)
    assert executor.prefilled == 149
    assert [sink.finish(index) for index in range(5)] == ["aborted", "length", "length", "aborted", "length"]
    assert all(sink.ids(index) == expected(prompt, 20) for index in (1, 2, 4))
    assert core.allocator.num_free == core.allocator.num_pages


def test_if_the_first_completion_goes_before_the_prompt_is_there_the_next_one_prefills_it() -> None:
    executor = FakeExecutor()
    core = make_core(executor, max_num_batched_tokens=64)
    sink = add(core, request("several", prompt_of(300), n=3))
    core.step()
    core.abort("several", 0)
    run(core)
    assert [sink.finish(index) for index in range(3)] == ["aborted", "length", "length"]
    assert sink.ids(2) == expected(prompt_of(300), 20)


def test_preempted_sequences_get_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("step3_jax.layout.admission.RESERVED_OUTPUT", 8)
    monkeypatch.setattr("step3_jax.layout.admission.GROWTH_PAGES", 1)
    core = make_core(FakeExecutor(), num_pages=10)
    sinks = [add(core, request(str(index), prompt_of(60, index), 300)) for index in range(4)]
    while core.has_work:
        core.step()
        check_pages(core)
    assert core.stats.num_preemptions > 0
    assert [sink.ids() for sink in sinks] == [expected(prompt_of(60, index), 300) for index in range(4)]


def test_sequences_that_make_several_tokens_a_step_are_preempted_and_streamed_like_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("step3_jax.layout.admission.RESERVED_OUTPUT", 8)
    monkeypatch.setattr("step3_jax.layout.admission.GROWTH_PAGES", 1)
    core = make_core(FakeExecutor(), num_pages=10, speculative_config={"method": "ngram", "num_speculative_tokens": 4})
    sinks = [add(core, request(str(index), prompt_of(60, index), 300, steps=4)) for index in range(4)]
    while core.has_work:
        core.step()
        check_pages(core)
    stats = core.stats
    assert stats.num_preemptions > 0
    assert [sink.ids() for sink in sinks] == [expected(prompt_of(60, index), 300) for index in range(4)]
    assert max(len(output.token_ids) for sink in sinks for output in sink) == 4
    assert stats.num_decode_steps < 300 < stats.num_generated_tokens


def test_a_failed_call_ends_its_requests_and_the_others_get_what_they_would_have() -> None:
    executor = FakeExecutor()
    core = make_core(executor, num_pages=40, max_num_batched_tokens=64, enable_prefix_caching=False)
    decoding = add(core, request("decoding", prompt_of(10), 60))
    core.step()
    core.step()
    assert decoding.ids()
    prefilling = add(core, request("prefilling", prompt_of(400, 3)))
    executor.failures["prefill"] = RuntimeError("out of memory")
    run(core)
    assert (prefilling.finish(), prefilling.ids()) == ("failed", ())
    assert "RuntimeError: out of memory" in prefilling[-1].error
    assert (decoding.finish(), decoding.ids()) == ("length", expected(prompt_of(10), 60))
    assert core.allocator.num_free == core.allocator.num_pages


@pytest.mark.parametrize("name", ["decode", "late_decode"])
def test_a_failed_decode_call_spares_what_was_only_prefilled(name: str) -> None:
    executor = FakeExecutor()
    core = make_core(executor, num_pages=40, max_num_batched_tokens=64)
    decoding = add(core, request("decoding", prompt_of(10), 60))
    core.step()
    long = add(core, request("long", prompt_of(400, 3)))
    waiting = [add(core, request(f"waiting {index}", prompt_of(70, index))) for index in range(5)]
    core.step()
    executor.failures[name] = RuntimeError("lost")
    run(core)
    assert decoding.finish() == "failed"
    assert decoding.ids() == expected(prompt_of(10), len(decoding.ids()))
    assert long.ids() == expected(prompt_of(400, 3), 20)
    assert [sink.ids() for sink in waiting] == [expected(prompt_of(70, index), 20) for index in range(5)]


def test_a_late_failure_of_a_chunk_is_that_of_its_own_requests() -> None:
    executor = FakeExecutor()
    core = make_core(executor, num_pages=40, max_num_batched_tokens=64)
    decoding = add(core, request("decoding", prompt_of(10), 60))
    core.step()
    long = add(core, request("long", prompt_of(400, 3)))
    core.step()
    executor.failures["late_prefill"] = RuntimeError("lost")
    run(core)
    assert (long.finish(), decoding.finish()) == ("failed", "length")
    assert decoding.ids() == expected(prompt_of(10), 60)


def make_image(fill: float) -> ProcessedImage:
    pixels = np.full((3, 8, 8), fill, np.float32)
    found = plan(8, 8)
    return ProcessedImage(pixels, np.zeros((0, 3, 8, 8), np.float32), found)


def test_images_that_fail_end_their_own_request_alone() -> None:
    executor = FakeExecutor()
    core = make_core(executor)
    image = make_image(0.5)
    places = tuple(range(3, 3 + image.num_features))
    with_image = Request("image", Prompt(tuple(prompt_of(300)), None, (image,), places), other_params(), 0)
    executor.failures["encode"] = RuntimeError("no memory for it")
    failed, plain = add(core, with_image), add(core, request("plain", prompt_of(30)))
    run(core)
    assert failed.finish() == "failed"
    assert "no memory for it" in failed[-1].error
    assert plain.ids() == expected(prompt_of(30), 20)
    with pytest.raises(ValueError, match="image places are given for images"):
        core.add(Request("bad", Prompt(tuple(prompt_of(300)), None, (image,), places[:-1]), other_params(), 0), Sink())


def test_an_image_is_found_by_its_pixels() -> None:
    executor = FakeExecutor()
    core = make_core(executor)

    def ask(name: str, fill: float) -> int:
        image = make_image(fill)
        places = tuple(range(70, 70 + image.num_features))
        sink = add(core, Request(name, Prompt(tuple(prompt_of(400)), None, (image,), places), other_params(), 0))
        run(core)
        return sink[-1].num_cached_tokens

    assert [ask("a", 0.5), ask("b", 0.25), ask("c", 0.5)] == [0, 64, 384]
    assert executor.calls.count("encode") == 2, "the third one's features are there"


def test_a_prompt_goes_on_while_a_stop_string_is_looked_for_in_what_was_generated() -> None:
    """With a stop string the next call waits until the text has been checked; without one it is dispatched before."""
    for stop, calls in ((["x"], 1), ([], 2)):
        executor = FakeExecutor()
        core = make_core(executor)
        add(core, request("one", prompt_of(5), stop=stop))
        core.step()
        assert executor.calls.count("decode") == calls


def test_a_request_id_is_used_once_at_a_time() -> None:
    core = make_core(FakeExecutor())
    add(core, request("one", [1, 2]))
    with pytest.raises(ValueError, match="request_id 'one' is in use"):
        add(core, request("one", [1, 2]))
    run(core)
    add(core, request("one", [1, 2]))


def test_max_tokens_must_fit_only_where_that_is_asked_for() -> None:
    core = make_core(FakeExecutor())
    params = SamplingParams(temperature=0, max_tokens=600)
    with pytest.raises(ValueError, match=r"100 tokens and 600 more .* together 700; at most max_model_len = 640"):
        core.check(Request("one", Prompt(tuple(prompt_of(100))), params, 0, must_fit=True))
    core.check(Request("one", Prompt(tuple(prompt_of(100))), params, 0))


ACTIONS = st.tuples(
    st.sampled_from(["add", "add", "step", "step", "step", "abort", "abort one", "fail", "late", "interrupt"]),
    st.integers(0, 2**20),
)


@settings(max_examples=120, deadline=None)
@given(st.lists(ACTIONS, max_size=80), st.sampled_from([1, 2]), st.booleans(), st.booleans())
# Two groups hold their prompts' pages for sequences that wait, and nothing runs.
@example([("step", 0), ("add", 0), ("add", 33974), ("add", 33974), ("add", 0)], 1, True, False)
def test_whatever_comes_no_page_leaks_and_every_sequence_gets_its_tokens(
    actions: list[tuple[str, int]], num_shards: int, has_prefix_cache: bool, has_speculation: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("step3_jax.layout.admission.RESERVED_OUTPUT", 16)
        patch.setattr("step3_jax.layout.admission.GROWTH_PAGES", 1)
        executor = FakeExecutor(num_shards)
        speculation = {"method": "ngram", "num_speculative_tokens": 4} if has_speculation else None
        core = make_core(executor, num_pages=10, enable_prefix_caching=has_prefix_cache, speculative_config=speculation)
        sinks: dict[str, tuple[Sink, Request]] = {}
        for action, number in actions:
            drawn = random.Random(number)
            if action == "add":
                # Few starts, so that many prompts share pages.
                prompt = prompt_of(drawn.choice([1, 30, 64, 65, 129, 200, 330]), drawn.randrange(2))
                one = request(
                    str(len(sinks)),
                    prompt,
                    drawn.choice([1, 5, 70, 200]),
                    drawn.choice([1, 4, 32]),
                    drawn.choice([1, 1, 3]),
                )
                sinks[one.request_id] = add(core, one), one
            elif action == "abort" and sinks:
                core.abort(drawn.choice(list(sinks)))
            elif action == "abort one" and sinks:
                core.abort(drawn.choice(list(sinks)), drawn.randrange(3))
            elif action == "fail":
                executor.failures[drawn.choice(["prefill", "decode", "copy"])] = RuntimeError("lost")
            elif action == "late":
                executor.failures[drawn.choice(["late_prefill", "late_decode"])] = RuntimeError("lost")
            elif action == "interrupt":
                executor.failures["decode"] = KeyboardInterrupt()
            else:
                with contextlib.suppress(KeyboardInterrupt):
                    core.step()
                check_pages(core)
        executor.failures.clear()
        run(core)
        check_pages(core)
        assert core.allocator.num_free == core.allocator.num_pages
        assert not core.scheduler.slots
        for sink, one in sinks.values():
            for index in range(one.params.n):
                want = expected(one.prompt.token_ids, min(one.params.max_tokens or 0, 640 - len(one.prompt.token_ids)))
                found, finish = sink.ids(index), sink.finish(index)
                assert found == (want if finish == "length" else want[: len(found)])
                assert finish in ("length", "aborted", "failed")
                assert sum(bool(output.finish) for output in sink if output.index == index) == 1


def test_ten_thousand_aborts_leave_nothing_behind() -> None:
    drawn = random.Random(0)
    core = make_core(FakeExecutor(), num_pages=24, max_num_seqs=8)
    open_ids: list[str] = []
    for number in range(10_000):
        name = str(number)
        add(core, request(name, prompt_of(drawn.randrange(1, 200), drawn.randrange(3)), 40, 4, drawn.choice([1, 1, 2])))
        open_ids.append(name)
        if len(open_ids) > 12:
            for _ in range(drawn.randrange(1, 6)):
                core.abort(open_ids.pop(drawn.randrange(len(open_ids))))
            core.step()
    for name in open_ids:
        core.abort(name)
    core.settle()
    assert (core.has_work, core.allocator.num_free) == (False, core.allocator.num_pages)
    assert not core._sinks
    check_pages(core)
