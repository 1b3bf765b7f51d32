"""Constrained sequences in the core, by a matcher without a grammar: their tokens, and their effect on others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from step3_jax.engine.constraint import SequenceConstraint
from step3_jax.engine.request import Prompt, Request
from step3_jax.sampling.params import SamplingParams
from step3_jax.sampling.structured import StructuredOutputsParams
from tests.rule import Rule, digit_rule, mask_of
from tests.unit.engine.fake import VOCAB_SIZE, FakeExecutor, expected, next_allowed, next_token
from tests.unit.engine.test_core import Sink, add, check_pages, make_core, prompt_of, request, run

END = 60
# What it gets without a constraint has no END in it.
PROMPT = next(
    prompt for prompt in (prompt_of(70, start) for start in range(VOCAB_SIZE)) if END not in expected(prompt, 40)
)


def rule_of(rule: Callable[[Sequence[int]], set[int]] = digit_rule, begins_after: int | None = None) -> Rule:
    return Rule(rule, VOCAB_SIZE, END, begins_after)


def ruled(prompt: Sequence[int], count: int, rule=digit_rule, num_free: int = 0) -> tuple[int, ...]:
    """What a prompt gets under a rule that starts after `num_free` tokens."""
    ids = [*prompt, *expected(prompt, num_free)]
    while len(ids) < len(prompt) + count:
        ids.append(next_allowed(mask_of(rule(ids[len(prompt) + num_free :]), VOCAB_SIZE), next_token(ids)))
        if ids[-1] == END:
            break
    return tuple(ids[len(prompt) :])


def constrained(name: str, prompt: list[int], constraint: Rule, max_tokens: int = 40, **values: object) -> Request:
    one = request(name, prompt, max_tokens, stop_token_ids=(END,), **values)
    return dataclasses.replace(one, constraint=constraint)


@pytest.mark.parametrize("speculation", [None, {"method": "ngram", "num_speculative_tokens": 4}])
def test_every_token_is_allowed_and_company_gets_what_it_gets_alone(speculation: dict[str, object] | None) -> None:
    """Where tokens are guessed, only the other rows use them."""
    core = make_core(FakeExecutor(), speculative_config=speculation)
    prompts = [prompt_of(70, start) for start in range(4)]
    sinks = [add(core, constrained(f"c{place}", prompts[place], rule_of())) for place in range(2)]
    sinks += [add(core, request(f"f{place}", prompts[place], 40)) for place in (2, 3)]
    while core.has_work:
        core.step()
        check_pages(core)
    assert [sink.ids() for sink in sinks] == [
        *(ruled(prompt, 40) for prompt in prompts[:2]),
        *(expected(prompt, 40) for prompt in prompts[2:]),
    ]
    assert [sink.finish() for sink in sinks] == ["stop", "stop", "length", "length"]


def test_tokens_without_a_choice_are_prefilled_and_not_decoded() -> None:
    executor = FakeExecutor()
    core = make_core(executor)
    sink = add(core, constrained("one", prompt_of(70), rule_of()))
    run(core)
    assert sink.ids() == ruled(prompt_of(70), 40)
    assert len(sink.ids()) == 31
    assert executor.calls.count("decode") == 31 - 12
    assert executor.calls.count("prefill") == 1 + 3
    assert core.stats.num_generated_tokens == 31
    assert core.stats.num_prompt_tokens == 70
    assert [output.token_ids for output in sink if len(output.token_ids) > 1] == [
        (14, 15, 16, 17),
        (22, 23, 24, 25),
        (30, 31, 32, 33),
    ]


def test_with_log_probabilities_all_tokens_are_decoded() -> None:
    executor = FakeExecutor()
    core = make_core(executor)
    sink = add(core, constrained("one", prompt_of(70), rule_of(), logprobs=1))
    run(core)
    assert sink.ids() == ruled(prompt_of(70), 40)
    assert executor.calls.count("decode") == 31


@pytest.mark.parametrize("max_tokens", range(1, 12))
def test_an_output_is_never_longer_than_asked_for(max_tokens: int) -> None:
    core = make_core(FakeExecutor())
    sink = add(core, constrained("one", prompt_of(5), rule_of(), max_tokens))
    run(core)
    assert (sink.ids(), sink.finish()) == (ruled(prompt_of(5), max_tokens), "length")


def test_a_stop_token_without_a_choice_ends_the_output() -> None:
    core = make_core(FakeExecutor())
    one = constrained("one", prompt_of(5), rule_of())
    params = dataclasses.replace(one.params, stop_token_ids=(17,))
    sink = add(core, dataclasses.replace(one, params=params))
    run(core)
    assert (sink.ids(), sink.finish()) == (ruled(prompt_of(5), 8), "stop")
    assert sink.ids()[-1] == 17


@pytest.mark.parametrize("place", [0, 3, 13, 25])
def test_reasoning_is_free_and_takes_many_steps_a_call(place: int) -> None:
    executor = FakeExecutor()
    core = make_core(executor)
    free = expected(PROMPT, 30)
    mark = free[place]
    num_free = free.index(mark) + 1
    sink = add(core, constrained("one", PROMPT, rule_of(begins_after=mark), 60))
    run(core)
    assert sink.ids() == ruled(PROMPT, 60, num_free=num_free)
    assert sink.ids()[:num_free] == free[:num_free]
    assert sink.finish() == "stop"
    # One for the first token, then 8 steps per call, and one per token afterwards.
    most = 1 + -(-(num_free - 1) // 8)
    assert executor.calls.count("decode") == most + 31 - 12


def test_reasoning_that_does_not_end_is_cut_off_by_its_length() -> None:
    core = make_core(FakeExecutor())
    sink = add(core, constrained("one", PROMPT, rule_of(begins_after=VOCAB_SIZE + 5), 20))
    run(core)
    assert (sink.ids(), sink.finish()) == (expected(PROMPT, 20), "length")


def test_a_mark_that_is_the_last_token_allowed_ends_with_length() -> None:
    core = make_core(FakeExecutor())
    mark = expected(PROMPT, 9)[-1]
    num_free = expected(PROMPT, 9).index(mark) + 1
    sink = add(core, constrained("one", PROMPT, rule_of(begins_after=mark), num_free))
    run(core)
    assert (sink.ids(), sink.finish()) == (expected(PROMPT, num_free), "length")


def test_a_matcher_that_fails_ends_its_request_alone() -> None:
    def fail_at(count: int) -> Callable[[Sequence[int]], set[int]]:
        def rule(output: Sequence[int]) -> set[int]:
            if len(output) == count:
                raise ValueError("it has too many items")
            return {1, 2, 3}

        return rule

    core = make_core(FakeExecutor())
    sinks = [add(core, constrained(f"c{count}", PROMPT, rule_of(fail_at(count)))) for count in (0, 5)]
    other, nothing = (
        add(core, request("other", PROMPT, 20)),
        add(core, constrained("none", PROMPT, rule_of(lambda _: set()))),
    )
    run(core)
    assert [sink.finish() for sink in sinks] == ["failed", "failed"]
    assert [len(sink.ids()) for sink in sinks] == [0, 5]
    assert sinks[1][-1].error == "its structured output cannot continue: it has too many items"
    assert "no token is allowed next" in nothing[-1].error
    assert other.ids() == expected(PROMPT, 20)
    check_pages(core)
    assert core.allocator.num_free == core.allocator.num_pages


@pytest.mark.parametrize("call", ["decode", "late_decode", "prefill", "late_prefill"])
@pytest.mark.parametrize("step", [1, 2, 6, 11])
def test_others_are_computed_again_with_the_same_tokens(call: str, step: int) -> None:
    executor = FakeExecutor()
    core = make_core(executor)
    mark = expected(PROMPT, 5)[-1]
    num_free = expected(PROMPT, 5).index(mark) + 1
    first = add(core, constrained("first", PROMPT, rule_of()))
    second = add(core, constrained("second", PROMPT, rule_of(begins_after=mark), 60))
    for number in range(200):
        if not core.has_work:
            break
        if number == step:
            executor.failures[call] = KeyboardInterrupt()
        try:
            core.step()
        except KeyboardInterrupt:
            continue
    assert first.ids() == ruled(PROMPT, 40)
    assert second.ids() == ruled(PROMPT, 60, num_free=num_free)


def test_a_full_cache_changes_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("step3_jax.layout.admission.RESERVED_OUTPUT", 8)
    monkeypatch.setattr("step3_jax.layout.admission.GROWTH_PAGES", 1)
    core = make_core(FakeExecutor(), num_pages=10)
    prompts = [prompt_of(60, start) for start in range(4)]

    def rule(output: Sequence[int]) -> set[int]:
        return digit_rule(output[-(len(output) % 30) :] if len(output) % 30 else [])

    sinks = [add(core, constrained(f"c{place}", prompt, rule_of(rule), 300)) for place, prompt in enumerate(prompts)]
    while core.has_work:
        core.step()
        check_pages(core)
    assert core.scheduler.num_preemptions
    assert [sink.ids() for sink in sinks] == [ruled(prompt, 300, rule) for prompt in prompts]


def test_completions_of_one_prompt_have_a_matcher_each_and_may_be_aborted() -> None:
    executor = FakeExecutor()
    core = make_core(executor, num_pages=40, max_num_seqs=2)
    prompt = prompt_of(150)
    sink = add(core, constrained("several", prompt, rule_of(), n=4))
    for _ in range(4):
        core.step()
    core.abort("several", 0)
    while core.has_work:
        core.step()
        check_pages(core)
    assert [sink.finish(index) for index in range(4)] == ["aborted", "stop", "stop", "stop"]
    assert all(sink.ids(index) == ruled(prompt, 40) for index in (1, 2, 3))


def test_min_tokens_keeps_the_end_away_as_long_as_there_is_a_choice() -> None:
    def rule(output: Sequence[int]) -> set[int]:
        return {END, 1, 2} if len(output) < 9 else {END}

    core = make_core(FakeExecutor())
    sinks = [add(core, constrained(f"m{least}", prompt_of(9), rule_of(rule), min_tokens=least)) for least in (4, 30)]
    run(core)
    assert END not in sinks[0].ids()[:4]
    assert len(sinks[1].ids()) == 10, "it may only end, so it does"
    assert [sink.finish() for sink in sinks] == ["stop", "stop"]


def test_a_request_whose_form_was_not_made_a_constraint_is_refused() -> None:
    params = SamplingParams(structured_outputs=StructuredOutputsParams(regex="a"))
    with pytest.raises(ValueError, match=r"make it with Engine\.new_request"):
        make_core(FakeExecutor()).add(Request("one", Prompt((1, 2)), params, 0), Sink())


def test_a_constraint_follows_an_output_that_goes_back() -> None:
    state = SequenceConstraint(rule_of(begins_after=7))
    state.follow([1, 2])
    assert not state.is_active
    state.follow([1, 2, 7, 3])
    assert state.is_active
    state.follow([1, 2, 7, 3, 4])
    state.follow([1, 2])
    assert not state.is_active
    state.follow([1, 2, 7, 6, 7])
    mask = np.zeros((2,), np.int32)
    state.fill(mask)
    assert mask.tolist() == mask_of(digit_rule([6, 7]), VOCAB_SIZE).tolist()
