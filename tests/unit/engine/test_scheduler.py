"""Admission, chunks, slots, growth and preemption, without a device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Seq

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from step3_jax.cache.allocator import PageAllocator
from step3_jax.engine.bucket_table import BucketTable
from step3_jax.engine.config import EngineConfig
from step3_jax.engine.request import Prompt, Request
from step3_jax.engine.scheduler import Scheduler
from step3_jax.engine.sequence import Group, Sequence
from step3_jax.layout.admission import MAX_PASSES, MAX_PREEMPTIONS
from step3_jax.sampling.batch import SamplingRow
from step3_jax.sampling.params import SamplingParams

NUM_PAGES = 12


@dataclasses.dataclass
class Clerk:
    """A scheduler, with the invariants it must keep."""

    scheduler: Scheduler
    allocator: PageAllocator

    def check(self) -> None:
        running, slots = self.scheduler.running, self.scheduler.slots
        assert sorted(map(id, running)) == sorted(id(one) for one in slots if one is not None)
        assert len(slots) & (len(slots) - 1) == 0
        assert len(slots) <= 4
        assert all(len(one.pages) * 64 >= len(one.token_ids) - 1 for one in running)
        pages = [page for one in running for page in one.pages]
        assert len(set(pages)) == len(pages) == self.allocator.num_pages - self.allocator.num_free


def clerk(max_num_batched_tokens: int = 128, num_pages: int = NUM_PAGES, **values: int) -> Clerk:
    allocator = PageAllocator(num_pages)
    scheduler = Scheduler(
        allocator,
        buckets=BucketTable.of(
            EngineConfig(max_num_seqs=4, max_num_batched_tokens=max_num_batched_tokens), max_pages=num_pages
        ),
        has_prefix_cache=False,
        **values,
    )
    return Clerk(scheduler, allocator)


def sequence(num_prompt: int, max_tokens: int = 1) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens)
    ids = list(range(num_prompt))
    group = Group(Request("", Prompt(tuple(ids)), params, 0), b"root", {}, 0.0, 0.0)
    group.sequences.append(Sequence(group, 0, SamplingRow(params, max_tokens, (0, 0), ()), 32, ids, num_prompt))
    return group.sequences[0]


def admitted(scheduler: Scheduler, sequences: Seq[Sequence]) -> list[bool]:
    scheduler.admit()
    return [one in scheduler.running for one in sequences]


def prefill(scheduler: Scheduler) -> None:
    while scheduler.has_prefill:
        for chunk in scheduler.plan_chunk():
            chunk.sequence.num_computed += chunk.num_tokens


def decode(scheduler: Scheduler, num_steps: int) -> int:
    """Tokens that the next call makes of each."""
    count, stuck = scheduler.make_room(num_steps)
    assert not stuck
    for one in scheduler.running:
        if one.is_ready:
            new = min(count, one.sampling.max_tokens - one.num_output)
            one.token_ids += [0] * new
            one.num_computed += new
    return count


def test_small_ones_pass_a_large_one_only_so_often() -> None:
    own = clerk()
    # 8 pages, 8 pages, 1 page each.
    first, large = sequence(500, 12), sequence(500, 12)
    small = [sequence(10) for _ in range(MAX_PASSES + 3)]
    own.scheduler.add([first, large, *small])
    passed = 0
    assert admitted(own.scheduler, [first, large, small[0]]) == [True, False, True]
    while large not in own.scheduler.running:
        for one in own.scheduler.running[1:]:
            own.scheduler.release(one)
            passed += 1
        own.scheduler.admit()
        if passed >= MAX_PASSES:
            assert own.scheduler.running == (first,), "now all wait for the large one"
            own.scheduler.release(first)
            own.scheduler.admit()
    assert passed == large.num_passed == MAX_PASSES
    own.check()


def test_pages_are_those_of_all_tokens_but_the_last_and_of_the_first_output() -> None:
    own = clerk(num_pages=40)
    exact, over, long = sequence(60, 5), sequence(60, 6), sequence(60, 2000)
    own.scheduler.add([exact, over, long])
    own.scheduler.admit()
    # 59 + 512 tokens.
    assert [len(one.pages) for one in (exact, over, long)] == [1, 2, 9]


def test_long_prompts_come_in_chunks_of_whole_pages_and_leave_their_last_token() -> None:
    own = clerk(max_num_batched_tokens=128)
    sequences = [sequence(300), sequence(1), sequence(41), sequence(70)]
    own.scheduler.add(sequences)
    own.scheduler.admit()
    assert [one.is_ready for one in sequences] == [False, True, False, False]
    seen = []
    while own.scheduler.has_prefill:
        chunks = own.scheduler.plan_chunk()
        seen.append([(sequences.index(chunk.sequence), chunk.start, chunk.num_tokens) for chunk in chunks])
        for chunk in chunks:
            chunk.sequence.num_computed += chunk.num_tokens
    # The first gets half of a chunk while others wait, then all of it.
    assert seen == [[(0, 0, 64), (2, 0, 40)], [(0, 64, 64), (3, 0, 64)], [(0, 128, 64), (3, 64, 5)], [(0, 192, 107)]]
    assert own.scheduler.plan_chunk() == []
    assert all(one.is_ready for one in sequences)


def test_a_limit_on_long_prompts_holds_only_while_others_wait() -> None:
    own = clerk(max_num_batched_tokens=256, long_prefill_tokens=64)
    sequences = [sequence(300), sequence(150)]
    own.scheduler.add(sequences)
    own.scheduler.admit()
    found = [(chunk.start, chunk.num_tokens) for chunk in own.scheduler.plan_chunk()]
    # 64 each first; what is left goes to the older one.
    assert found == [(0, 192), (0, 64)]


def test_slots_stay_while_sequences_end_and_shrink_late() -> None:
    own = clerk()
    sequences = [sequence(5) for _ in range(4)]
    own.scheduler.add(sequences)
    own.scheduler.admit()
    version = own.scheduler.version
    own.scheduler.release(sequences[0])
    own.scheduler.release(sequences[2])
    assert own.scheduler.slots == [None, sequences[1], None, sequences[3]]
    assert own.scheduler.version == version
    new = sequence(5)
    own.scheduler.add([new])
    own.scheduler.admit()
    assert own.scheduler.slots == [new, sequences[1], None, sequences[3]]
    assert own.scheduler.version > version
    own.scheduler.release(sequences[1])
    own.scheduler.release(sequences[3])
    assert own.scheduler.slots == [new]
    own.scheduler.release(new)
    assert own.scheduler.slots == []
    own.check()


def test_a_sequence_grows_by_some_pages_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("step3_jax.layout.admission.RESERVED_OUTPUT", 10)
    own = clerk(num_pages=40)
    one = sequence(60, 1500)
    own.scheduler.add([one])
    own.scheduler.admit()
    prefill(own.scheduler)
    assert len(one.pages) == 2
    version = own.scheduler.table_version
    assert [decode(own.scheduler, 32) for _ in range(2)] == [32, 32]
    assert (len(one.pages), own.scheduler.table_version) == (2, version)
    assert decode(own.scheduler, 32) == 32
    assert (len(one.pages), own.scheduler.table_version) == (10, version + 1)
    own.check()


def test_the_least_computed_one_gives_its_pages_back_and_comes_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("step3_jax.layout.admission.RESERVED_OUTPUT", 1)
    own = clerk(num_pages=6)
    old, young, late = sequence(128, 200), sequence(100, 60), sequence(64, 100)
    own.scheduler.add([old, young, late])
    own.scheduler.admit()
    prefill(own.scheduler)
    assert (len(old.pages), len(young.pages), len(late.pages)) == (2, 2, 1)
    own.scheduler.add([sequence(500)])
    while not own.scheduler.num_preemptions:
        decode(own.scheduler, 64)
        own.check()
    # One page was free; the next growth took those of the one with the fewest tokens in the cache.
    assert late not in own.scheduler.running
    assert (late.num_preemptions, late.num_computed) == (1, 0)
    own.scheduler.release(old)
    own.scheduler.release(young)
    own.scheduler.admit()
    assert own.scheduler.running[0] is late
    own.check()


def test_what_was_preempted_often_is_admitted_whole_and_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("step3_jax.layout.admission.RESERVED_OUTPUT", 1)
    own = clerk(num_pages=8)
    small = sequence(10, 190)
    small.num_preemptions = MAX_PREEMPTIONS
    other = sequence(64, 400)
    own.scheduler.add([small, other])
    own.scheduler.admit()
    assert len(small.pages) == 4
    prefill(own.scheduler)
    while other in own.scheduler.running:
        decode(own.scheduler, 64)
    # The other one, with more in the cache, had to go.
    assert small in own.scheduler.running
    assert (small.num_preemptions, other.num_preemptions) == (MAX_PREEMPTIONS, 1)
    own.check()


def test_a_lone_sequence_that_fills_the_cache_cannot_go_on() -> None:
    own = clerk(num_pages=2)
    one = sequence(100, 500)
    own.scheduler.add([one])
    own.scheduler.admit()
    prefill(own.scheduler)
    # 128 tokens fit; 99 are there.
    assert own.scheduler.make_room(64) == (29, [])
    one.token_ids += [0] * 29
    one.num_computed += 29
    assert own.scheduler.make_room(64) == (64, [one])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["add", "prefill", "decode", "release", "abort", "lose"]),
            st.integers(1, 300),
            st.integers(1, 80),
        ),
        max_size=60,
    )
)
def test_whatever_comes_pages_and_slots_add_up(actions: list[tuple[str, int, int]]) -> None:
    own = clerk()
    scheduler, arrived = own.scheduler, []
    for action, number, other in actions:
        if action == "add":
            arrived.append(sequence(number, other))
            scheduler.add(arrived[-1:])
        elif action == "prefill":
            chunks = scheduler.plan_chunk()
            assert sum(chunk.num_tokens for chunk in chunks) <= 128
            for chunk in chunks:
                chunk.sequence.num_computed += chunk.num_tokens
        elif action == "decode":
            decode(scheduler, other)
            for one in scheduler.running:
                if one.num_output >= one.sampling.max_tokens:
                    scheduler.release(one)
        elif action == "release" and scheduler.running:
            scheduler.release(scheduler.running[number % len(scheduler.running)])
        elif action == "abort" and arrived:
            scheduler.release(arrived[number % len(arrived)])
        elif action == "lose":
            scheduler.preempt_all()
        scheduler.admit()
        own.check()
        # Something always runs if anything waits: an empty engine admits the next request.
        assert scheduler.running or not scheduler.num_waiting
    for one in arrived:
        scheduler.release(one)
    assert (own.allocator.num_free, scheduler.slots, scheduler.num_waiting) == (NUM_PAGES, [], 0)
