"""Which pages of the cache are whose: numbers on the host, no memory."""

from __future__ import annotations

from collections.abc import Iterable


class OutOfPages(RuntimeError):
    """More pages are asked for than are free."""


class PageAllocator:
    """Hands out pages by number and counts their owners; a page is free again when its last owner lets go.

    A cache that is spread over devices has shards, each with as many pages, one shard's numbers behind the other's. All
    pages of a sequence are of one shard.

    Attributes:
      num_pages: Pages there are.
      num_shards: Shards they are in.
    """

    def __init__(self, num_pages: int, num_shards: int = 1) -> None:
        """All pages are free.

        Raises:
          ValueError: If there is not at least one page in each shard, or they do not have equally many.
        """
        if num_pages < num_shards or num_pages % num_shards:
            raise ValueError(
                f"a cache of {num_pages} pages is asked for; a multiple of {num_shards} is needed, and at least "
                f"{num_shards}"
            )
        self.num_pages = num_pages
        self.num_shards = num_shards
        self._shard_pages = num_pages // num_shards
        # The page that was freed last is the next one out: it may still be in a processor's cache.
        self._free = [list(reversed(range(end - self._shard_pages, end))) for end in self._ends()]
        self._owners = [0] * num_pages

    @property
    def num_free(self) -> int:
        """Pages that nobody owns."""
        return sum(map(len, self._free))

    def num_free_in(self, shard: int) -> int:
        """Pages of a shard that nobody owns."""
        return len(self._free[shard])

    def shard_of(self, page: int) -> int:
        """The shard that a page is in."""
        return page // self._shard_pages

    def allocate(self, count: int, shard: int = 0) -> list[int]:
        """Numbers of `count` pages of a shard, each with one owner.

        Raises:
          OutOfPages: If so many are not free; none is taken then.
        """
        free = self._free[shard]
        if count > len(free):
            raise OutOfPages(f"{count} pages of the KV cache are needed, {len(free)} of {self._shard_pages} are free")
        pages = [free.pop() for _ in range(count)]
        for page in pages:
            self._owners[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Adds an owner to each page.

        Raises:
          ValueError: If a page is free.
        """
        for page in pages:
            self._check_owned(page)
            self._owners[page] += 1

    def free(self, pages: Iterable[int]) -> None:
        """Takes an owner from each page.

        Raises:
          ValueError: If a page is free already.
        """
        for page in pages:
            self._check_owned(page)
            self._owners[page] -= 1
            if not self._owners[page]:
                self._free[self.shard_of(page)].append(page)

    def _ends(self) -> range:
        return range(self._shard_pages, self.num_pages + 1, self._shard_pages)

    def _check_owned(self, page: int) -> None:
        if not 0 <= page < self.num_pages or not self._owners[page]:
            raise ValueError(f"page {page} of the KV cache has no owner")
