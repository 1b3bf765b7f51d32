"""What the engine does for a sharded cache, on the host only: pages, slots and chunks of a row belong to one shard."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from step3_jax.cache.allocator import OutOfPages, PageAllocator
from step3_jax.engine import loading
from step3_jax.engine.bucket_table import BucketTable
from step3_jax.engine.config import EngineConfig
from step3_jax.engine.llm import LLM
from step3_jax.engine.pack import pack_chunk
from step3_jax.engine.request import Prompt, Request
from step3_jax.engine.scheduler import Scheduler
from step3_jax.engine.sequence import Group, Sequence
from step3_jax.sampling.batch import SamplingRow
from step3_jax.sampling.params import SamplingParams

NUM_SHARDS, SHARD_PAGES = 3, 6


def make_sequence(num_prompt: int, max_tokens: int = 1) -> Sequence:
    params, ids = SamplingParams(max_tokens=max_tokens), list(range(num_prompt))
    group = Group(Request("", Prompt(tuple(ids)), params, 0), b"root", {}, 0.0, 0.0)
    group.sequences.append(Sequence(group, 0, SamplingRow(params, max_tokens, (0, 0), ()), 1, ids, num_prompt))
    return group.sequences[0]


def make_buckets(max_num_seqs: int = 2, max_tokens: int = 100) -> BucketTable:
    config = EngineConfig(max_num_seqs=NUM_SHARDS * max_num_seqs, max_num_batched_tokens=NUM_SHARDS * max_tokens)
    return BucketTable.of(config, max_pages=3, num_shards=NUM_SHARDS)


def make_scheduler(max_num_seqs: int = 2, max_tokens: int = 100) -> tuple[PageAllocator, Scheduler]:
    allocator = PageAllocator(NUM_SHARDS * SHARD_PAGES, NUM_SHARDS)
    scheduler = Scheduler(allocator, buckets=make_buckets(max_num_seqs, max_tokens), has_prefix_cache=False)
    return allocator, scheduler


def test_pages_come_from_the_shard_that_is_asked_and_go_back_to_it() -> None:
    allocator = PageAllocator(6, 3)
    assert allocator.allocate(2, 1) == [2, 3]
    assert [allocator.num_free_in(shard) for shard in range(3)] == [2, 0, 2]
    with pytest.raises(OutOfPages, match="1 pages of the KV cache are needed, but 0 of 2 are free"):
        allocator.allocate(1, 1)
    allocator.free([2, 3])
    assert (allocator.num_free, allocator.num_free_in(1), allocator.shard_of(3)) == (6, 2, 1)


@pytest.mark.parametrize(("num_pages", "num_shards"), [(0, 1), (2, 3), (7, 3)])
def test_shards_have_equally_many_pages(num_pages: int, num_shards: int) -> None:
    with pytest.raises(ValueError, match=f"a multiple of {num_shards} is needed"):
        PageAllocator(num_pages, num_shards)


def test_rows_go_to_the_shard_with_the_fewest_and_slots_are_by_shard() -> None:
    _, scheduler = make_scheduler()
    rows = [make_sequence(5) for _ in range(5)]
    scheduler.add(rows)
    scheduler.admit()
    assert [scheduler.shard_of(row) for row in rows] == [0, 1, 2, 0, 1]
    assert scheduler.slots == [rows[0], rows[3], rows[1], rows[4], rows[2], None]
    scheduler.release(rows[1])
    late = make_sequence(5)
    scheduler.add([late])
    scheduler.admit()
    # Shards 1 and 2 have one row each; 2 has as many free pages, and 1 comes first.
    assert scheduler.slots == [rows[0], rows[3], late, rows[4], rows[2], None]


def test_a_row_that_no_shard_has_pages_for_waits_though_all_together_have_them() -> None:
    allocator, scheduler = make_scheduler()
    scheduler.add([make_sequence(4 * 64) for _ in range(NUM_SHARDS)])
    long = make_sequence(3 * 64)
    scheduler.add([long])
    scheduler.admit()
    assert (allocator.num_free, scheduler.num_waiting) == (6, 1)
    scheduler.release(scheduler.running[2])
    scheduler.admit()
    assert scheduler.shard_of(long) == 2


def test_each_shard_reads_as_much_at_once() -> None:
    _, scheduler = make_scheduler(max_tokens=50)
    rows = [make_sequence(81), make_sequence(31), make_sequence(11), make_sequence(41)]
    scheduler.add(rows)
    scheduler.admit()
    chunks = scheduler.plan_chunk()
    # The last one shares the second one's shard, which has more free pages than the first one's, and half of its chunk.
    found = [(rows.index(chunk.sequence), chunk.num_tokens) for chunk in chunks]
    assert found == [(0, 50), (1, 25), (2, 10), (3, 25)]


def test_a_chunk_has_each_shards_tokens_in_its_own_part() -> None:
    _, scheduler = make_scheduler()
    rows = [make_sequence(21), make_sequence(11), make_sequence(41), make_sequence(6)]
    scheduler.add(rows)
    scheduler.admit()
    chunks = scheduler.plan_chunk()
    batch = pack_chunk(chunks, make_buckets(), [scheduler.shard_of(chunk.sequence) for chunk in chunks])
    tokens = np.asarray(batch.token_ids).reshape(NUM_SHARDS, -1)
    # All parts have the bucket of the longest.
    assert tokens.shape[1] == 64
    assert tokens[0, :25].tolist() == [*range(20), *range(5)]
    assert tokens[2, :40].tolist() == [*range(40)]
    assert np.asarray(batch.query_starts).reshape(NUM_SHARDS, 3).tolist() == [[0, 20, 25], [0, 10, 10], [0, 40, 40]]
    assert np.asarray(batch.lengths).tolist() == [20, 5, 10, 0, 40, 0]
    pages = np.asarray(batch.table)[:, 0].tolist()
    assert pages == [rows[0].pages[0], rows[3].pages[0], rows[1].pages[0], 0, rows[2].pages[0], 0]


@settings(max_examples=40)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 300), st.integers(1, 60)), max_size=40))
def test_whatever_comes_rows_keep_to_their_shards(actions: list[tuple[bool, int, int]]) -> None:
    allocator, scheduler = make_scheduler()
    for is_new, number, other in actions:
        if is_new:
            scheduler.add([make_sequence(number, other)])
        elif scheduler.running:
            scheduler.release(scheduler.running[number % len(scheduler.running)])
        scheduler.admit()
        size = len(scheduler.slots) // NUM_SHARDS
        assert size in (0, 1, 2)
        assert len(scheduler.slots) == size * NUM_SHARDS
        for place, row in enumerate(scheduler.slots):
            if row is not None:
                assert {allocator.shard_of(page) for page in row.pages} == {place // size}
        taken = [page for row in scheduler.running for page in row.pages]
        assert len(set(taken)) == len(taken) == allocator.num_pages - allocator.num_free
        assert scheduler.running or not scheduler.num_waiting


def test_a_setting_that_does_not_divide_the_model_is_refused_before_weights_are_read(
    goldens: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr(loading, "load_model", fail)
    with pytest.raises(
        ValueError, match=r"hidden_size is 64, which tp = 3 does not cut .* nearest that does: dp 3, tp 1"
    ):
        LLM(goldens / "tiny_text", tensor_parallel_size=3)
    with pytest.raises(ValueError, match="needs 288 devices, and there are"):
        LLM(goldens / "tiny_text", data_parallel_size=288)
