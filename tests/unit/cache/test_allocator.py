"""Pages have one free list and as many owners as were counted."""

from __future__ import annotations

import collections

import pytest
from hypothesis import given
from hypothesis import strategies as st

from step3_jax.cache.allocator import OutOfPages, PageAllocator

# What to do (take, add an owner, release) and with how many pages, or whose.
ACTIONS = st.lists(st.tuples(st.sampled_from(["allocate", "share", "free"]), st.integers(0, 6)), max_size=60)


@given(num_pages=st.integers(1, 12), actions=ACTIONS)
def test_no_page_has_two_masters_and_none_is_lost(num_pages: int, actions: list[tuple[str, int]]) -> None:
    allocator = PageAllocator(num_pages)
    held: list[list[int]] = []
    for action, number in actions:
        if action == "allocate" and number <= allocator.num_free:
            taken = {page for pages in held for page in pages}
            pages = allocator.allocate(number)
            assert len(set(pages)) == number
            assert not taken & set(pages)
            assert all(0 <= page < num_pages for page in pages)
            held.append(pages)
        elif action == "allocate":
            free = allocator.num_free
            with pytest.raises(
                OutOfPages, match=f"{number} pages of the KV cache are needed, but {free} of {num_pages}"
            ):
                allocator.allocate(number)
            assert allocator.num_free == free
        elif action == "share" and held:
            allocator.share(held[number % len(held)])
            held.append(list(held[number % len(held)]))
        elif held:
            allocator.free(held.pop(number % len(held)))
        owners = collections.Counter(page for pages in held for page in pages)
        assert allocator.num_free == num_pages - len(owners)
    for pages in held:
        allocator.free(pages)
    assert allocator.num_free == num_pages


def test_a_free_page_is_neither_freed_nor_shared() -> None:
    allocator = PageAllocator(3)
    [page] = allocator.allocate(1)
    allocator.free([page])
    for wrong in (page, -1, 3):
        with pytest.raises(ValueError, match=f"page {wrong} of the KV cache has no owner"):
            allocator.free([wrong])
        with pytest.raises(ValueError, match="no owner"):
            allocator.share([wrong])


def test_a_cache_without_pages_is_refused() -> None:
    with pytest.raises(ValueError, match="cache of 0 pages"):
        PageAllocator(0)
