"""The engine's rules for its cache and its calls, as numbers: its scheduler and the planner's simulation follow them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from step3_jax.layout.page import PAGE_SIZE, pages_for

# Output tokens that a sequence has pages for when it is admitted, and pages that it grows by.
RESERVED_OUTPUT = 512
GROWTH_PAGES = 8
# How often smaller sequences may overtake one whose pages are not free.
MAX_PASSES = 8
# Preemptions after which a sequence is admitted with all its pages, and keeps them.
MAX_PREEMPTIONS = 3
# Most decode steps of a call: the longest that the host does not see the generated tokens.
STEPS_PER_CALL = 32


class Unfinished(NamedTuple):
    """A sequence with tokens to prefill.

    Attributes:
      num_computed: Tokens in the cache.
      num_to_prefill: Tokens still to prefill.
      shard: Its shard of the cache.
    """

    num_computed: int
    num_to_prefill: int
    shard: int


def count_admitted_pages(num_tokens: int, max_cached: int, *, is_pinned: bool, shard_pages: int) -> int:
    """Pages that a sequence is admitted with.

    Args:
      num_tokens: Tokens of prompt and output so far.
      max_cached: The most tokens it ever has in the cache.
      is_pinned: Whether it was preempted `MAX_PREEMPTIONS` times: it then gets all the pages that it may ever need.
      shard_pages: Pages of a shard, the most it can have.
    """
    needed = max_cached if is_pinned else min(max_cached, num_tokens - 1 + RESERVED_OUTPUT)
    return min(pages_for(needed), shard_pages)


def count_growth(num_tokens: int, num_steps: int, max_cached: int, *, num_pages: int, num_free: int) -> int:
    """Pages that a sequence gets for its next tokens, as far as they are free.

    Args:
      num_tokens: Tokens of prompt and output so far.
      num_steps: Tokens to generate.
      max_cached: Most tokens that it ever has in the cache.
      num_pages: Its pages.
      num_free: Free pages of its shard.
    """
    needed = pages_for(min(num_tokens - 1 + num_steps, max_cached)) - num_pages
    if needed <= 0:
        return 0
    return min(max(needed, min(GROWTH_PAGES, pages_for(max_cached) - num_pages)), num_free)


def count_room(num_tokens: int, num_steps: int, max_cached: int, *, num_pages: int) -> int:
    """Steps that a sequence has pages for, at most `num_steps`; 0 or less if it has none for the next token."""
    if num_pages >= pages_for(max_cached):
        return num_steps
    return min(num_steps, num_pages * PAGE_SIZE - (num_tokens - 1))


def divide_chunk(
    unfinished: Sequence[Unfinished], *, num_shards: int, max_num_batched_tokens: int, long_prefill_tokens: int
) -> list[int]:
    """Tokens of each sequence to prefill next, oldest sequences first.

    While several sequences of a shard wait, none gets more than `long_prefill_tokens` before all have had their share.
    Chunks end where pages end.

    Args:
      unfinished: Sequences with tokens to prefill, the oldest first.
      num_shards: Shards of the cache.
      max_num_batched_tokens: Most tokens of a chunk in each shard.
      long_prefill_tokens: Most of those for one sequence while others wait.
    """
    room = [max_num_batched_tokens] * num_shards
    counts = [0] * len(unfinished)
    num_of_shard = [0] * num_shards
    for one in unfinished:
        num_of_shard[one.shard] += 1
    for is_limited in (True, False):
        for index, one in enumerate(unfinished):
            left = one.num_to_prefill - counts[index]
            limit = room[one.shard]
            if is_limited and num_of_shard[one.shard] > 1:
                limit = min(limit, long_prefill_tokens)
            count = min(left, limit)
            if count < left and max_num_batched_tokens >= PAGE_SIZE:
                start = one.num_computed + counts[index]
                count = max(0, (start + count) // PAGE_SIZE * PAGE_SIZE - start)
            counts[index] += count
            room[one.shard] -= count
    return counts
