"""What the engine does for a cache in shards, on the host alone: pages, slots and chunks of a row are of one shard."""

from __future__ import annotations

import argparse
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from step3_jax.cache.allocator import OutOfPages, PageAllocator
from step3_jax.cli.arguments.devices import add_parallel
from step3_jax.cli.parallel import read_parallel
from step3_jax.engine import llm
from step3_jax.engine.completion import Completion
from step3_jax.engine.job import Job, Row
from step3_jax.engine.pack import pack_chunk
from step3_jax.engine.request import Prompt, Request
from step3_jax.engine.scheduler import Scheduler
from step3_jax.mesh import CPU_DEVICES
from step3_jax.sampling.batch import SamplingRow
from step3_jax.sampling.params import SamplingParams
from step3_jax.sharding import Parallel

NUM_SHARDS, SHARD_PAGES = 3, 6


def make_row(num_prompt: int, max_tokens: int = 1) -> Row:
    params = SamplingParams(max_tokens=max_tokens)
    job = Job(Request(0, Prompt(tuple(range(num_prompt))), params, 0), 1, 0.0, 0.0)
    job.rows.append(Row(job, Completion(job.request, 0, None, ()), SamplingRow(params, max_tokens, (0, 0), ())))
    return job.rows[0]


def make_scheduler(max_batch_size: int = 2, max_tokens: int = 100) -> tuple[PageAllocator, Scheduler]:
    allocator = PageAllocator(NUM_SHARDS * SHARD_PAGES, NUM_SHARDS)
    return allocator, Scheduler(allocator, max_batch_size=max_batch_size, max_num_batched_tokens=max_tokens)


def test_pages_come_from_the_shard_that_is_asked_and_go_back_to_it() -> None:
    allocator = PageAllocator(6, 3)
    assert allocator.allocate(2, 1) == [2, 3]
    assert [allocator.num_free_in(shard) for shard in range(3)] == [2, 0, 2]
    with pytest.raises(OutOfPages, match="1 pages of the KV cache are needed, 0 of 2 are free"):
        allocator.allocate(1, 1)
    allocator.free([2, 3])
    assert (allocator.num_free, allocator.num_free_in(1), allocator.shard_of(3)) == (6, 2, 1)


@pytest.mark.parametrize(("num_pages", "num_shards"), [(0, 1), (2, 3), (7, 3)])
def test_shards_have_equally_many_pages(num_pages: int, num_shards: int) -> None:
    with pytest.raises(ValueError, match=f"a multiple of {num_shards} is needed"):
        PageAllocator(num_pages, num_shards)


def test_rows_go_to_the_shard_with_the_fewest_and_slots_are_by_shard() -> None:
    _, scheduler = make_scheduler()
    rows = [make_row(5) for _ in range(5)]
    scheduler.add(rows)
    scheduler.admit()
    assert [scheduler.shard_of(row) for row in rows] == [0, 1, 2, 0, 1]
    assert scheduler.slots == [rows[0], rows[3], rows[1], rows[4], rows[2], None]
    scheduler.release(rows[1])
    late = make_row(5)
    scheduler.add([late])
    scheduler.admit()
    # Shards 1 and 2 have one row each; 2 has as many free pages, and 1 comes first.
    assert scheduler.slots == [rows[0], rows[3], late, rows[4], rows[2], None]


def test_a_row_that_no_shard_has_pages_for_waits_though_all_together_have_them() -> None:
    allocator, scheduler = make_scheduler()
    scheduler.add([make_row(4 * 64) for _ in range(NUM_SHARDS)])
    long = make_row(3 * 64)
    scheduler.add([long])
    scheduler.admit()
    assert (allocator.num_free, scheduler.num_waiting) == (6, 1)
    scheduler.release(scheduler.running[2])
    scheduler.admit()
    assert scheduler.shard_of(long) == 2


def test_each_shard_reads_as_much_at_once() -> None:
    _, scheduler = make_scheduler(max_tokens=50)
    rows = [make_row(81), make_row(31), make_row(11), make_row(41)]
    scheduler.add(rows)
    scheduler.admit()
    chunks = scheduler.plan_chunk()
    # The last row shares the second one's shard, which has more free pages than the first one's.
    assert [(rows.index(chunk.row), chunk.num_tokens) for chunk in chunks] == [(0, 50), (1, 30), (2, 10), (3, 20)]


def test_a_chunk_has_each_shards_tokens_in_its_own_part() -> None:
    _, scheduler = make_scheduler()
    rows = [make_row(21), make_row(11), make_row(41), make_row(6)]
    scheduler.add(rows)
    scheduler.admit()
    chunks = scheduler.plan_chunk()
    batch = pack_chunk(
        chunks,
        max_batch_size=2,
        max_num_batched_tokens=100,
        max_pages=3,
        shards=[scheduler.shard_of(chunk.row) for chunk in chunks],
        num_shards=NUM_SHARDS,
    )
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
            scheduler.add([make_row(number, other)])
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


def parse(*words: str) -> Parallel | None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_parallel(parser)
    return read_parallel(parser.parse_args(words))


def test_options_have_the_names_that_vllm_users_know(monkeypatch: pytest.MonkeyPatch) -> None:
    # Leaves this process with its one device.
    monkeypatch.setenv(CPU_DEVICES, "1")
    assert parse() is None
    long = parse("--data-parallel-size", "2", "--tensor-parallel-size", "4", "--expert-parallel-size", "8")
    assert long == parse("--dp", "2", "--tp", "4", "--ep", "8") == Parallel(2, 4, 8)
    assert parse("--ep", "4") == Parallel(dp=4, ep=4)
    assert parse("--tp", "2", "--tensor-parallel-attention") == Parallel(tp=2, attention="tensor")
    assert parse("--tp", "2", "--expert-exchange", "all_to_all") == Parallel(tp=2, exchange="all_to_all")
    with pytest.raises(ValueError, match="are for several devices: add --dp or --tp"):
        parse("--tensor-parallel-attention")
    with pytest.raises(ValueError, match="tp is 0"):
        parse("--tp", "0")


def test_a_setting_that_does_not_divide_the_model_is_refused_before_weights_are_read(
    goldens: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr(llm, "load_model", fail)
    with pytest.raises(
        ValueError, match=r"hidden_size is 64, which tp = 3 does not cut .* nearest that does: dp 3, tp 1"
    ):
        llm.LLM(goldens / "tiny_text", parallel=Parallel(tp=3))
    with pytest.raises(ValueError, match="needs 288 devices, and there are"):
        llm.LLM(goldens / "tiny_text", parallel=Parallel(dp=288))
