"""Which sequences run: they wait, get a slot and pages, are prefilled in chunks, and decode until they end.

First come, first served, but smaller sequences may overtake one whose pages are not free, at most `MAX_PASSES` times. It
is admitted with pages for its tokens and the first `RESERVED_OUTPUT` tokens of output, and gets more as it grows. When
pages run out, the sequence with the fewest tokens in the cache goes back to the head of the queue (preemption) and is
recomputed later; after `MAX_PREEMPTIONS` times it is admitted with all the pages that it may ever need, and is never
preempted again. So there is always progress, and every sequence ends.

With a sharded cache, slots and chunks are sharded too: a sequence has its slot and its pages in one shard, the one that
has the most of its prompt cached, and among equals the one with the fewest sequences.

Nothing here touches a device.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Iterable
from typing import NamedTuple

from pallas_kernels.storage import PAGE_SIZE
from step3_jax.cache.allocator import PageAllocator
from step3_jax.cache.prefix import extend_keys
from step3_jax.engine.bucket_table import BucketTable
from step3_jax.engine.sequence import Group, Sequence
from step3_jax.layout.admission import (
    MAX_PASSES,
    MAX_PREEMPTIONS,
    Unfinished,
    count_admitted_pages,
    count_growth,
    count_room,
    divide_chunk,
)
from step3_jax.layout.page import pages_for


class Chunk(NamedTuple):
    """The tokens of one sequence to prefill next: `num_tokens`, starting at `start`."""

    sequence: Sequence
    start: int
    num_tokens: int


class PageCopy(NamedTuple):
    """A page to copy to another one."""

    source: int
    target: int


class Scheduler:
    """Slots and a queue.

    Attributes:
      slots: The running sequences, each in its slot of the batch; None where a slot is free. Shards have equally many,
        zero or a power of two, shard after shard.
      version: Changes whenever a sequence gets a slot or moves to another; when one ends, its slot only becomes free.
      table_version: Changes whenever a sequence in a slot gets pages.
      num_preemptions: Sequences that lost their pages so far.
      num_queries: Prompt tokens looked up in the prefix cache so far.
      num_hits: Those that were found.
    """

    def __init__(
        self,
        allocator: PageAllocator,
        *,
        buckets: BucketTable,
        long_prefill_tokens: int | None = None,
        has_prefix_cache: bool = True,
    ) -> None:
        """Starts with nothing to do.

        Args:
          allocator: Allocator of the cache's pages.
          buckets: Sizes: slots, and tokens that are prefilled at once.
          long_prefill_tokens: The most of those for one sequence while others wait; half of them if None.
          has_prefix_cache: Whether pages are published for later sequences.
        """
        self.slots: list[Sequence | None] = []
        self.version = 0
        self.table_version = 0
        self.num_preemptions = 0
        self.num_queries = 0
        self.num_hits = 0
        self._allocator = allocator
        self._buckets = buckets
        self._max_num_seqs = buckets.max_num_seqs
        self._max_num_batched_tokens = buckets.max_num_batched_tokens
        self._long_prefill_tokens = long_prefill_tokens or max(1, buckets.max_num_batched_tokens // 2)
        self._has_prefix_cache = has_prefix_cache
        self._waiting: collections.deque[Sequence] = collections.deque()
        # In the order of admission.
        self._running: list[Sequence] = []
        # Groups that hold pages of their prompt.
        self._holding: list[Group] = []

    @property
    def running(self) -> tuple[Sequence, ...]:
        """The sequences in slots, in the order of admission."""
        return tuple(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences without a slot that could get one."""
        return len(self._waiting)

    @property
    def has_prefill(self) -> bool:
        """Whether a sequence in a slot has tokens to prefill."""
        return any(sequence.num_to_prefill for sequence in self._running)

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Puts sequences at the end of the queue."""
        self._waiting.extend(sequences)

    def admit(self) -> list[PageCopy]:
        """Gives slots and pages to queued sequences, as far as they go.

        Returns:
          Page copies to make before anything else: a sequence that shares its prompt's pages gets its own copy of the last
          one, which is not full.
        """
        admitted: list[Sequence] = []
        copies: list[PageCopy] = []
        blocked: list[Sequence] = []
        for sequence in tuple(self._waiting):
            if not any(len(own) < self._max_num_seqs for own in self._sequences_of_shards()):
                break
            if len(blocked) > MAX_PASSES or any(other.num_passed >= MAX_PASSES for other in blocked):
                break
            taken = self._take_pages(sequence)
            if taken is None:
                blocked.append(sequence)
                continue
            for other in blocked:
                other.num_passed += 1
            copies += taken
            sequence.group.admitted_s = sequence.group.admitted_s or time.monotonic()
            self._waiting.remove(sequence)
            self._running.append(sequence)
            admitted.append(sequence)
        if admitted:
            self._give_slots(admitted)
        elif not self._running and self._waiting and self._holding:
            # Pages held for waiting sequences may be all that keeps any of them from running.
            self._drop(self._holding[-1])
            return self.admit()
        return copies

    def plan_chunk(self) -> list[Chunk]:
        """The next tokens to prefill, oldest sequences first; nothing if there are none.

        While several sequences of a shard wait to be prefilled, none gets more than `long_prefill_tokens` before all
        have had their share. Chunks end where pages end, so that the same pages are computed the same way with and
        without cached ones before them.
        """
        unfinished = [sequence for sequence in self._running if sequence.num_to_prefill]
        counts = divide_chunk(
            [Unfinished(one.num_computed, one.num_to_prefill, self.shard_of(one)) for one in unfinished],
            num_shards=self._allocator.num_shards,
            max_num_batched_tokens=self._max_num_batched_tokens,
            long_prefill_tokens=self._long_prefill_tokens,
        )
        chunks = zip(unfinished, counts, strict=True)
        return [Chunk(sequence, sequence.num_computed, count) for sequence, count in chunks if count]

    def make_room(self, num_steps: int) -> tuple[int, list[Sequence]]:
        """Gives pages to the decoding sequences, for up to `num_steps` more tokens each.

        Preempts others if pages run out.

        Returns:
          How many steps there is room for, at least 1 if anything is ready, and sequences that fill a shard's cache alone
          and cannot continue.
        """
        stuck: list[Sequence] = []
        for sequence in tuple(self._running):
            while sequence.is_ready:
                room = self._grow(sequence, num_steps)
                if room:
                    num_steps = min(num_steps, room)
                    break
                if not self._reclaim(sequence):
                    stuck.append(sequence)
                    break
        return num_steps, stuck

    def extend(self, sequence: Sequence, num_tokens: int) -> int:
        """Gives a decoding sequence pages for more tokens, as far as pages are free; returns for how many."""
        return max(0, self._grow(sequence, num_tokens)) if num_tokens else 0

    def publish(self, sequence: Sequence) -> None:
        """Publishes the whole pages that a sequence has written."""
        if not self._has_prefix_cache or not sequence.pages:
            return
        num_whole = sequence.num_computed // PAGE_SIZE
        self._extend_keys(sequence, num_whole)
        for page in range(sequence.num_published, num_whole):
            self._allocator.publish(sequence.pages[page], sequence.page_keys[page])
        sequence.num_published = max(sequence.num_published, num_whole)

    def fork(self, first: Sequence) -> None:
        """Queues the other sequences of a group once one has prefilled the prompt, whose pages they share."""
        group = first.group
        others = [one for one in group.sequences if not (one.pages or one.is_finished or self.is_queued(one))]
        if not others:
            return
        group.held_pages = first.pages[: pages_for(first.num_prompt - 1)]
        if group.held_pages:
            self._allocator.share(group.held_pages)
            self._holding.append(group)
        self._waiting.extendleft(reversed(others))

    def is_queued(self, sequence: Sequence) -> bool:
        """Whether a sequence waits for a slot."""
        return sequence in self._waiting

    def release(self, sequence: Sequence) -> None:
        """Removes a sequence, whether it runs, waits or is gone already, and frees its pages."""
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        sequence.is_finished = True
        self._take_out(sequence)
        self._let_go(sequence.group)

    def preempt(self, sequence: Sequence) -> None:
        """Puts a running sequence back at the head of the queue; its tokens are recomputed or found in the prefix cache."""
        self._take_out(sequence)
        sequence.num_computed = 0
        self._waiting.appendleft(sequence)

    def preempt_all(self) -> None:
        """Puts all sequences back into the queue, in order, for when the cache's contents are lost."""
        for group in tuple(self._holding):
            self._drop(group)
        for sequence in reversed(self._running.copy()):
            self.preempt(sequence)
        self._allocator.unpublish_all()

    def shard_of(self, sequence: Sequence) -> int:
        """The shard of a running sequence."""
        return self._allocator.shard_of(sequence.pages[0])

    def _take_pages(self, sequence: Sequence) -> list[PageCopy] | None:
        """Allocates pages for a sequence, if any shard has enough; returns the copies to make."""
        count = count_admitted_pages(
            len(sequence.token_ids),
            sequence.max_cached,
            is_pinned=_is_pinned(sequence),
            shard_pages=self._allocator.shard_pages,
        )
        held = sequence.group.held_pages
        best: tuple[int, list[int]] | None = None
        for shard, hits in self._choices(sequence):
            missing = count - len(hits) + self._allocator.num_unowned(hits)
            if missing <= self._allocator.num_free_in(shard):
                best = shard, hits
                break
        if best is None:
            return None
        shard, hits = best
        # Share first, so that allocating does not evict them.
        self._allocator.share(hits)
        sequence.pages = [*hits, *self._allocator.allocate(count - len(hits), shard)]
        sequence.num_computed = len(hits) * PAGE_SIZE
        sequence.num_published = len(hits)
        copies: list[PageCopy] = []
        num_prompt_pages = len(held)
        if held and self._allocator.shard_of(held[0]) == shard and not sequence.num_output:
            if num_prompt_pages > len(hits):
                copies.append(PageCopy(held[-1], sequence.pages[num_prompt_pages - 1]))
            sequence.num_computed = sequence.num_prompt - 1
        elif sequence.group.num_cached_tokens is None:
            sequence.group.num_cached_tokens = sequence.num_computed
            self.num_queries += sequence.num_prompt * self._has_prefix_cache
            self.num_hits += sequence.num_computed
        return copies

    def _choices(self, sequence: Sequence) -> list[tuple[int, list[int]]]:
        """Shards with a free slot, the best first, each with its pages that the sequence can share."""
        held = sequence.group.held_pages
        if self._has_prefix_cache:
            # The last token is left to the decode step, so its page is never whole.
            self._extend_keys(sequence, (len(sequence.token_ids) - 1) // PAGE_SIZE)
        choices = []
        for shard, own in enumerate(self._sequences_of_shards()):
            if len(own) >= self._max_num_seqs:
                continue
            hits = self._allocator.find(sequence.page_keys[: (len(sequence.token_ids) - 1) // PAGE_SIZE], shard)
            if held and self._allocator.shard_of(held[0]) == shard:
                whole = held[: (sequence.num_prompt - 1) // PAGE_SIZE]
                hits = max(hits, whole, key=len)
            choices.append((-len(hits), len(own), -self._allocator.num_free_in(shard), shard, hits))
        return [(shard, hits) for *_, shard, hits in sorted(choices)]

    def _give_slots(self, admitted: Iterable[Sequence]) -> None:
        size = self._buckets.fit_seqs(max(map(len, self._sequences_of_shards())))
        parts = [[*part, *[None] * (size - len(part))] for part in self._parts()]
        for sequence in admitted:
            part = parts[self.shard_of(sequence)]
            part[part.index(None)] = sequence
            self._let_go(sequence.group)
        self.slots = [sequence for part in parts for sequence in part]
        self.version += 1
        self.table_version += 1

    def _grow(self, sequence: Sequence, num_steps: int) -> int:
        """Gives a sequence pages for up to `num_steps` more tokens; returns how many it has room for."""
        shard = self.shard_of(sequence)
        tokens, most = len(sequence.token_ids), sequence.max_cached
        count = count_growth(
            tokens, num_steps, most, num_pages=len(sequence.pages), num_free=self._allocator.num_free_in(shard)
        )
        if count:
            sequence.pages += self._allocator.allocate(count, shard)
            self.table_version += 1
        return count_room(tokens, num_steps, most, num_pages=len(sequence.pages))

    def _reclaim(self, sequence: Sequence) -> bool:
        """Frees pages for a sequence that needs one; False if there are none to free, so that it cannot continue."""
        shard = self.shard_of(sequence)
        holding = [group for group in self._holding if self._allocator.shard_of(group.held_pages[0]) == shard]
        if holding:
            self._drop(holding[-1])
            return True
        own = self._sequences_of_shards()[shard]
        if len(own) == 1:
            return False
        # Among equals, the latest. Pinned sequences have all their pages, so `sequence` is not one.
        victim = min((one for one in reversed(own) if not _is_pinned(one)), key=lambda one: one.num_computed)
        victim.num_preemptions += 1
        self.num_preemptions += 1
        self.preempt(victim)
        return True

    def _take_out(self, sequence: Sequence) -> None:
        """Takes a sequence from its slot and frees its pages."""
        if sequence not in self._running:
            return
        self._running.remove(sequence)
        self.slots[self.slots.index(sequence)] = None
        pages, sequence.pages = sequence.pages, []
        self._allocator.free(pages)
        sequence.num_published = 0
        # Free slots cost little, another batch size costs another program: so the batch shrinks late.
        parts = self._sequences_of_shards()
        most = max(map(len, parts))
        if 4 * most * len(parts) <= len(self.slots):
            size = self._buckets.fit_seqs(most) if most else 0
            self.slots = [place for own in parts for place in (*own, *[None] * (size - len(own)))]
            self.version += 1
            self.table_version += 1

    def _let_go(self, group: Group) -> None:
        """Frees the prompt pages that a group holds once no sequence waits for them."""
        if group.held_pages and not group.is_waiting_for_prompt:
            self._drop(group)

    def _drop(self, group: Group) -> None:
        self._holding.remove(group)
        pages, group.held_pages = group.held_pages, []
        self._allocator.free(pages)

    def _extend_keys(self, sequence: Sequence, num_pages: int) -> None:
        if num_pages > len(sequence.page_keys):
            group = sequence.group
            extend_keys(sequence.page_keys, sequence.token_ids[: num_pages * PAGE_SIZE], group.root, group.marks)

    def _sequences_of_shards(self) -> list[list[Sequence]]:
        """The running sequences, by shard."""
        found: list[list[Sequence]] = [[] for _ in range(self._allocator.num_shards)]
        for sequence in self._running:
            found[self.shard_of(sequence)].append(sequence)
        return found

    def _parts(self) -> list[list[Sequence | None]]:
        """The slots of each shard."""
        size = len(self.slots) // self._allocator.num_shards
        return [self.slots[shard * size : (shard + 1) * size] for shard in range(self._allocator.num_shards)]


def _is_pinned(sequence: Sequence) -> bool:
    """Whether a sequence was preempted so often that it is admitted with all its pages and never preempted again."""
    return sequence.num_preemptions >= MAX_PREEMPTIONS
