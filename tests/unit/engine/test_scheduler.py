"""Admission, chunks, slots and pages, without a device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from step3_jax.cache.allocator import PageAllocator
from step3_jax.engine.completion import Completion
from step3_jax.engine.job import Job, Row
from step3_jax.engine.request import Prompt, Request
from step3_jax.engine.scheduler import Scheduler
from step3_jax.sampling.batch import SamplingRow
from step3_jax.sampling.params import SamplingParams

NUM_PAGES = 12


@dataclasses.dataclass
class Clerk:
    """A scheduler, with what it must keep to."""

    scheduler: Scheduler
    allocator: PageAllocator

    def check(self) -> None:
        running, slots = self.scheduler.running, self.scheduler.slots
        assert sorted(map(id, running)) == sorted(id(row) for row in slots if row is not None)
        assert len(slots) & (len(slots) - 1) == 0
        assert len(slots) <= 4
        assert all(len(row.pages) * 64 >= row.max_cached for row in running)
        pages = [page for row in running for page in row.pages]
        assert len(set(pages)) == len(pages) == NUM_PAGES - self.allocator.num_free


def clerk(max_num_batched_tokens: int = 100) -> Clerk:
    allocator = PageAllocator(NUM_PAGES)
    return Clerk(Scheduler(allocator, max_batch_size=4, max_num_batched_tokens=max_num_batched_tokens), allocator)


def row(num_prompt: int, max_tokens: int = 1) -> Row:
    params = SamplingParams(max_tokens=max_tokens)
    request = Request(0, Prompt(tuple(range(num_prompt))), params, 0)
    job = Job(request, 1, 0.0, 0.0)
    job.rows.append(Row(job, Completion(request, 0, None, ()), SamplingRow(params, max_tokens, (0, 0), ())))
    return job.rows[0]


def admitted(scheduler: Scheduler, rows: Sequence[Row]) -> list[bool]:
    scheduler.admit()
    return [one in scheduler.running for one in rows]


def test_first_come_first_served_even_if_a_later_one_would_fit() -> None:
    own = clerk()
    # 5 pages, 8 pages, 1 page: the second does not fit beside the first, and the third waits behind it.
    rows = [row(300, 20), row(500, 12), row(10)]
    own.scheduler.add(rows)
    assert admitted(own.scheduler, rows) == [True, False, False]
    assert (own.scheduler.num_waiting, own.allocator.num_free) == (2, 7)
    own.scheduler.release(rows[0])
    assert admitted(own.scheduler, rows) == [False, True, True]
    own.check()


def test_pages_are_those_of_all_tokens_but_the_last() -> None:
    own = clerk()
    exact, over = row(60, 5), row(60, 6)
    own.scheduler.add([exact, over])
    own.scheduler.admit()
    assert (len(exact.pages), len(over.pages)) == (1, 2)


def test_long_prompts_come_in_chunks_and_leave_their_last_token() -> None:
    own = clerk(max_num_batched_tokens=100)
    rows = [row(131), row(1), row(41), row(60)]
    own.scheduler.add(rows)
    own.scheduler.admit()
    assert [one.is_ready for one in rows] == [False, True, False, False]
    seen = []
    while own.scheduler.has_unread:
        chunks = own.scheduler.plan_chunk()
        seen.append([(rows.index(chunk.row), chunk.start, chunk.num_tokens) for chunk in chunks])
        for chunk in chunks:
            chunk.row.num_read += chunk.num_tokens
    assert seen == [[(0, 0, 100)], [(0, 100, 30), (2, 0, 40), (3, 0, 30)], [(3, 30, 29)]]
    assert own.scheduler.plan_chunk() == []
    assert all(one.is_ready for one in rows)


def test_slots_stay_while_rows_end_and_shrink_late() -> None:
    own = clerk()
    rows = [row(5) for _ in range(4)]
    own.scheduler.add(rows)
    own.scheduler.admit()
    version = own.scheduler.version
    own.scheduler.release(rows[0])
    own.scheduler.release(rows[2])
    assert own.scheduler.slots == [None, rows[1], None, rows[3]]
    assert own.scheduler.version == version
    new = row(5)
    own.scheduler.add([new])
    own.scheduler.admit()
    assert own.scheduler.slots == [new, rows[1], None, rows[3]]
    assert own.scheduler.version > version
    own.scheduler.release(rows[1])
    own.scheduler.release(rows[3])
    assert own.scheduler.slots == [new]
    own.scheduler.release(new)
    assert own.scheduler.slots == []
    own.check()


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.sampled_from(["add", "read", "release", "abort"]), st.integers(1, 300), st.integers(1, 80)),
        max_size=40,
    )
)
def test_whatever_comes_pages_and_slots_add_up(actions: list[tuple[str, int, int]]) -> None:
    own = clerk()
    scheduler, arrived = own.scheduler, []
    for action, number, other in actions:
        if action == "add":
            arrived.append(row(number, other))
            scheduler.add(arrived[-1:])
        elif action == "read":
            chunks = scheduler.plan_chunk()
            assert sum(chunk.num_tokens for chunk in chunks) <= 100
            for chunk in chunks:
                chunk.row.num_read += chunk.num_tokens
        elif action == "release" and scheduler.running:
            scheduler.release(scheduler.running[number % len(scheduler.running)])
        elif action == "abort" and arrived:
            scheduler.release(arrived[number % len(arrived)])
        scheduler.admit()
        own.check()
        # Nobody waits for nothing: an empty engine takes the next one.
        assert scheduler.running or not scheduler.num_waiting
    assert {id(one) for one in scheduler.clear()} <= {id(one) for one in arrived}
    assert (own.allocator.num_free, scheduler.slots, scheduler.num_waiting) == (NUM_PAGES, [], 0)
