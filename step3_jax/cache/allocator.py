"""Which pages of the cache belong to which sequences, and which hold tokens that another sequence may reuse.

Only numbers on the host, no memory. A page is in one of three states: owned (by one sequence or several), cached (no owner,
but its tokens are known by a key, so that a later sequence may take it), or free.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence


class OutOfPages(RuntimeError):
    """More pages are requested than are free."""


class PageAllocator:
    """Allocates pages by number and counts their owners.

    A cache that is spread over devices has shards, each with equally many pages, numbered shard after shard. All pages of
    a sequence are in one shard. When free pages run out, the least recently released cached page is used.

    Attributes:
      num_pages: Pages of all shards.
      num_shards: Number of shards.
      shard_pages: Pages per shard.
    """

    def __init__(self, num_pages: int, num_shards: int = 1) -> None:
        """Starts with all pages free.

        Raises:
          ValueError: Unless all shards have equally many pages, and at least one.
        """
        if num_pages < num_shards or num_pages % num_shards:
            raise ValueError(
                f"a cache of {num_pages} pages is requested; a multiple of {num_shards} is needed, and at least "
                f"{num_shards}"
            )
        self.num_pages = num_pages
        self.num_shards = num_shards
        self.shard_pages = num_pages // num_shards
        # Last in, first out: the page freed last may still be in a processor's cache.
        self._free = [list(reversed(range(end - self.shard_pages, end))) for end in self._ends()]
        self._owners = [0] * num_pages
        # For each shard: pages by key, and those without an owner, least recently used first.
        self._published: list[dict[bytes, int]] = [{} for _ in range(num_shards)]
        self._evictable: list[collections.OrderedDict[int, None]] = [
            collections.OrderedDict() for _ in range(num_shards)
        ]
        self._keys: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Pages without an owner, including cached ones."""
        return sum(self.num_free_in(shard) for shard in range(self.num_shards))

    @property
    def num_cached(self) -> int:
        """Pages without an owner whose tokens may be reused."""
        return sum(map(len, self._evictable))

    def num_free_in(self, shard: int) -> int:
        """Pages of a shard without an owner, including cached ones."""
        return len(self._free[shard]) + len(self._evictable[shard])

    def shard_of(self, page: int) -> int:
        """The shard of a page."""
        return page // self.shard_pages

    def allocate(self, count: int, shard: int = 0) -> list[int]:
        """Allocates `count` pages of a shard, each with one owner; cached pages lose their keys when they are needed.

        Raises:
          OutOfPages: If not enough are free; then none are taken.
        """
        available = self.num_free_in(shard)
        if count > available:
            raise OutOfPages(
                f"{count} pages of the KV cache are needed, but {available} of {self.shard_pages} are free"
            )
        free, evictable = self._free[shard], self._evictable[shard]
        pages = []
        for _ in range(count):
            if free:
                page = free.pop()
            else:
                page, _ = evictable.popitem(last=False)
                del self._published[shard][self._keys.pop(page)]
            self._owners[page] = 1
            pages.append(page)
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Adds an owner to each page.

        Raises:
          ValueError: If a page is free.
        """
        for page in pages:
            if self._is_cached(page):
                del self._evictable[self.shard_of(page)][page]
            else:
                self._check_owned(page)
            self._owners[page] += 1

    def free(self, pages: Sequence[int]) -> None:
        """Removes an owner from each page; a published page without an owner is cached, other pages become free.

        Args:
          pages: In the order of the sequence's tokens: the last ones are evicted first.

        Raises:
          ValueError: If a page is free already.
        """
        for page in reversed(pages):
            self._check_owned(page)
            self._owners[page] -= 1
            if self._owners[page]:
                continue
            shard = self.shard_of(page)
            if page in self._keys:
                self._evictable[shard][page] = None
            else:
                self._free[shard].append(page)

    def publish(self, page: int, key: bytes) -> None:
        """Makes a page known by the key of its tokens; it must be fully written. A known key is left unchanged.

        Raises:
          ValueError: If the page has no owner.
        """
        self._check_owned(page)
        published = self._published[self.shard_of(page)]
        if key not in published and page not in self._keys:
            published[key] = page
            self._keys[page] = key

    def find(self, keys: Iterable[bytes], shard: int = 0) -> list[int]:
        """Pages of a shard for the first keys, up to the first unknown one. They get no owner: see `share`."""
        published, pages = self._published[shard], []
        for key in keys:
            page = published.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def num_unowned(self, pages: Iterable[int]) -> int:
        """How many of the pages have no owner."""
        return sum(not self._owners[page] for page in pages)

    def unpublish_all(self) -> None:
        """Forgets all keys, for when the cache's contents are lost; cached pages become free."""
        for shard, evictable in enumerate(self._evictable):
            self._free[shard].extend(reversed(evictable))
            evictable.clear()
            self._published[shard].clear()
        self._keys.clear()

    def _ends(self) -> range:
        return range(self.shard_pages, self.num_pages + 1, self.shard_pages)

    def _is_cached(self, page: int) -> bool:
        return 0 <= page < self.num_pages and page in self._evictable[self.shard_of(page)]

    def _check_owned(self, page: int) -> None:
        if not 0 <= page < self.num_pages or not self._owners[page]:
            raise ValueError(f"page {page} of the KV cache has no owner")
