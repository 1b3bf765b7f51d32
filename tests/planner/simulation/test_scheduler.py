"""The scheduler of counts does what the engine's does, and requests arrive when they should."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from step3_jax.cache.allocator import PageAllocator
from step3_jax.engine.bucket_table import BucketTable
from step3_jax.engine.config import EngineConfig
from step3_jax.engine.request import Prompt
from step3_jax.engine.request import Request as EngineRequest
from step3_jax.engine.scheduler import Scheduler as EngineScheduler
from step3_jax.engine.sequence import Group, Sequence
from step3_jax.planner.simulation.arrival import Arrivals, arrive_at_rate, repeat_lengths
from step3_jax.planner.simulation.scheduler import Request, Scheduler
from step3_jax.planner.trace_file import TraceRequest
from step3_jax.sampling.batch import SamplingRow
from step3_jax.sampling.params import SamplingParams

SHARD_PAGES = 24
LENGTHS = st.lists(st.tuples(st.integers(1, 700), st.integers(1, 700)), min_size=1, max_size=12)


def engine_sequence(number: int, num_prompt: int, num_output: int) -> Sequence:
    params = SamplingParams(max_tokens=num_output)
    # Different prompts, so that nothing could be shared.
    ids = [number * 10_000 + place for place in range(num_prompt)]
    group = Group(EngineRequest(str(number), Prompt(tuple(ids)), params, 0), b"root", {}, 0.0, 0.0)
    group.sequences.append(Sequence(group, 0, SamplingRow(params, num_output, (0, 0), ()), 32, ids, num_prompt))
    return group.sequences[0]


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(1, 2), st.integers(8, 32), st.sampled_from([48, 128, 300]))
def test_the_same_requests_run_in_the_same_steps_as_in_the_engine(
    lengths: list[tuple[int, int]], num_shards: int, num_steps: int, max_tokens: int
) -> None:
    """Every chunk, every slot, every page count and every preemption, until all are finished."""
    config = EngineConfig(max_num_seqs=4, max_num_batched_tokens=max_tokens * num_shards)
    buckets = BucketTable.of(config, max_pages=SHARD_PAGES, num_shards=num_shards)
    theirs = EngineScheduler(
        PageAllocator(SHARD_PAGES * num_shards, num_shards), buckets=buckets, has_prefix_cache=False
    )
    ours = Scheduler(
        num_shards=num_shards,
        shard_pages=SHARD_PAGES,
        max_num_seqs=buckets.max_num_seqs,
        max_num_batched_tokens=buckets.max_num_batched_tokens,
    )
    sequences = [engine_sequence(number, *pair) for number, pair in enumerate(lengths)]
    requests = [Request(number, 0.0, *pair) for number, pair in enumerate(lengths)]
    theirs.add(sequences)
    for request in requests:
        assert ours.add(request)
    for step in itertools.count():
        theirs.admit()
        ours.admit(float(step))
        assert [int(one.group.request.request_id) for one in theirs.running] == [one.number for one in ours.running]
        assert [theirs.shard_of(one) for one in theirs.running] == [one.shard for one in ours.running]
        if not theirs.running:
            break
        chunks = theirs.plan_chunk()
        own_chunks = ours.plan_chunk()
        assert [(int(one.sequence.group.request.request_id), one.num_tokens) for one in chunks] == [
            (one.number, count) for one, count in own_chunks
        ]
        for chunk in chunks:
            chunk.sequence.num_computed += chunk.num_tokens
        for request, count in own_chunks:
            request.num_computed += count
        steps, stuck = theirs.make_room(num_steps)
        own_steps, own_stuck = ours.make_room(num_steps)
        assert steps == own_steps
        assert [int(one.group.request.request_id) for one in stuck] == [one.number for one in own_stuck]
        assert [len(one.pages) for one in theirs.running] == [one.num_pages for one in ours.running]
        assert theirs.num_preemptions == ours.num_preemptions
        for sequence in [*stuck]:
            theirs.release(sequence)
        for request in [*own_stuck]:
            ours.release(request)
        for sequence in [one for one in theirs.running if one.is_ready]:
            new = min(steps, sequence.sampling.max_tokens - sequence.num_output)
            sequence.token_ids += [0] * new
            sequence.num_computed += new
            if sequence.num_output == sequence.sampling.max_tokens:
                theirs.release(sequence)
        for request in [one for one in ours.running if one.is_ready]:
            new = min(steps, request.num_output - request.num_generated)
            request.num_tokens += new
            request.num_computed += new
            if request.num_generated == request.num_output:
                ours.release(request)
    assert not theirs.running
    assert not ours.running
    assert ours.num_waiting == theirs.num_waiting == 0


def test_a_full_queue_turns_requests_away() -> None:
    scheduler = Scheduler(num_shards=1, shard_pages=8, max_num_seqs=1, max_num_batched_tokens=64, max_queued=2)
    assert [scheduler.add(Request(number, 0.0, 10, 1)) for number in range(3)] == [True, True, False]
    assert scheduler.num_rejected == 1
    with pytest.raises(ValueError, match="0 pages per shard"):
        Scheduler(num_shards=1, shard_pages=0, max_num_seqs=1, max_num_batched_tokens=64)


def test_prompts_that_come_with_their_cache_are_ready_at_once() -> None:
    scheduler = Scheduler(num_shards=2, shard_pages=8, max_num_seqs=1, max_num_batched_tokens=64, has_prefill=False)
    request = Request(0, 0.0, 100, 5)
    scheduler.add(request)
    scheduler.admit(3.0)
    assert request.is_ready
    assert request.admitted_s == 3.0
    assert not scheduler.is_prefilling


def test_requests_come_at_their_rate_and_the_same_for_the_same_seed() -> None:
    requests = repeat_lengths(10, 5, 4000)
    found = arrive_at_rate(requests, 20.0, 7)
    times = [one.arrival_s or 0.0 for one in found.requests]
    assert times == sorted(times)
    assert times[-1] / 4000 == pytest.approx(1 / 20, rel=0.05)
    assert arrive_at_rate(requests, 20.0, 7) == found
    assert arrive_at_rate(requests, 20.0, 8) != found


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: repeat_lengths(0, 1, 1), "0 prompt tokens"),
        (lambda: repeat_lengths(1, 1, 0), "0 requests"),
        (lambda: arrive_at_rate([TraceRequest(1, 1)], 0.0, 0), "above 0"),
        (lambda: Arrivals([]), "no requests"),
        (lambda: Arrivals([TraceRequest(1, 1)], 0), "at least 1"),
        (lambda: Arrivals([TraceRequest(1, 1)]), "give a rate"),
    ],
)
def test_a_load_that_cannot_be_is_refused(make: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()  # type: ignore[operator]
