"""Who runs: rows wait, get a slot and pages, have their prompt read in chunks, and decode until they end.

First come, first served. A row is admitted when a slot is free and the pages for its prompt and all of its output are: so
no row that runs ever waits for a page, and none has to be thrown out. A row that ends early gives back what it did not
use. Nothing here touches a device.

Where the cache is in shards, so are slots and chunks: a row has its slot and its pages in one shard, the one that has the
fewest rows when it is admitted.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable
from typing import NamedTuple

from step3_jax.cache.allocator import PageAllocator
from step3_jax.cache.bucket import power_of_two
from step3_jax.cache.paged import pages_for
from step3_jax.engine.job import Row


class Chunk(NamedTuple):
    """Tokens of one prompt to be read next: `num_tokens` from `start` on."""

    row: Row
    start: int
    num_tokens: int


class Scheduler:
    """Slots and a queue.

    Attributes:
      slots: The rows that run, each at its place in the batch; None where a place is free. Shards have equally many,
        zero or a power of two, one shard's behind the other's.
      version: Changes whenever a row comes to a slot or moves to another; when one ends, its slot only gets free.
    """

    def __init__(self, allocator: PageAllocator, *, max_batch_size: int, max_num_batched_tokens: int) -> None:
        """Starts with nothing to do.

        Args:
          allocator: Of the cache's pages.
          max_batch_size: Most slots of a shard, a power of two.
          max_num_batched_tokens: Most tokens that a shard reads at once.
        """
        self.slots: list[Row | None] = []
        self.version = 0
        self._allocator = allocator
        self._max_batch_size = max_batch_size
        self._max_num_batched_tokens = max_num_batched_tokens
        self._waiting: collections.deque[Row] = collections.deque()
        # In the order they were admitted in.
        self._running: list[Row] = []

    @property
    def running(self) -> tuple[Row, ...]:
        """The rows in slots, in the order they were admitted in."""
        return tuple(self._running)

    @property
    def num_waiting(self) -> int:
        """Rows that have no slot yet."""
        return len(self._waiting)

    @property
    def has_unread(self) -> bool:
        """Whether a row in a slot has tokens of its prompt to be read."""
        return any(row.num_unread for row in self._running)

    def add(self, rows: Iterable[Row]) -> None:
        """Puts rows at the end of the queue."""
        self._waiting.extend(rows)

    def admit(self) -> None:
        """Gives slots and pages to rows of the queue, as far as they go."""
        admitted: list[Row] = []
        while self._waiting:
            count = pages_for(self._waiting[0].max_cached)
            shard = self._choose_shard(count)
            if shard is None:
                break
            row = self._waiting.popleft()
            row.pages = self._allocator.allocate(count, shard)
            self._running.append(row)
            admitted.append(row)
        if not admitted:
            return
        size = power_of_two(max(map(len, self._rows_of_shards())))
        parts = [[*part, *[None] * (size - len(part))] for part in self._parts()]
        for row in admitted:
            part = parts[self.shard_of(row)]
            part[part.index(None)] = row
        self.slots = [row for part in parts for row in part]
        self.version += 1

    def plan_chunk(self) -> list[Chunk]:
        """The next tokens of prompts to read, oldest rows first; nothing if all are read."""
        chunks, room = [], [self._max_num_batched_tokens] * self._allocator.num_shards
        for row in self._running:
            shard = self.shard_of(row)
            count = min(row.num_unread, room[shard])
            if count:
                chunks.append(Chunk(row, row.num_read, count))
                room[shard] -= count
        return chunks

    def release(self, row: Row) -> None:
        """Takes a row out, whether it runs, waits or is out already, and frees its pages."""
        if row in self._waiting:
            self._waiting.remove(row)
        if row not in self._running:
            return
        self._running.remove(row)
        self.slots[self.slots.index(row)] = None
        self._allocator.free(row.pages)
        row.pages = []
        # Free slots cost little, another batch size a program of its own: so the batch shrinks late.
        rows = self._rows_of_shards()
        most = max(map(len, rows))
        if 4 * most * len(rows) <= len(self.slots):
            size = power_of_two(most) if most else 0
            self.slots = [place for own in rows for place in (*own, *[None] * (size - len(own)))]
            self.version += 1

    def clear(self) -> list[Row]:
        """Takes all rows out; returns them."""
        rows = [*self._running, *self._waiting]
        for row in rows:
            self.release(row)
        return rows

    def shard_of(self, row: Row) -> int:
        """The shard of a row that runs."""
        return self._allocator.shard_of(row.pages[0])

    def _choose_shard(self, num_pages: int) -> int | None:
        """The shard for a row that needs so many pages; None if no shard has them and a slot."""
        rows = self._rows_of_shards()
        fitting = [
            (len(own), -self._allocator.num_free_in(shard), shard)
            for shard, own in enumerate(rows)
            if len(own) < self._max_batch_size and num_pages <= self._allocator.num_free_in(shard)
        ]
        return min(fitting)[2] if fitting else None

    def _rows_of_shards(self) -> list[list[Row]]:
        """The rows that run, by shard."""
        rows: list[list[Row]] = [[] for _ in range(self._allocator.num_shards)]
        for row in self._running:
            rows[self.shard_of(row)].append(row)
        return rows

    def _parts(self) -> list[list[Row | None]]:
        """The slots of each shard."""
        size = len(self.slots) // self._allocator.num_shards
        return [self.slots[shard * size : (shard + 1) * size] for shard in range(self._allocator.num_shards)]
