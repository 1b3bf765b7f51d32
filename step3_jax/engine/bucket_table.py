"""The sizes that programs are compiled for. Scheduler and packer choose from this table; the warm-up compiles all of it.

Each size costs seconds of compiling, and anything between two sizes is padded. So there are many sizes only where
padding is expensive: a chunk of twice the tokens takes twice as long. A page table as wide as the longest sequence costs
nothing, as attention reads only the pages in use; nor do sampling parameters, which are data. No jax here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Self

from step3_jax.engine.config import EngineConfig
from step3_jax.layout.admission import STEPS_PER_CALL

MIN_CHUNK_TOKENS = 32
# Smallest chunk with image places: the smallest image of Step3 has 169.
MIN_IMAGE_CHUNK_TOKENS = 256
# Views or windows per shard in one call of the tower; more would only take more memory, as four fill a device.
IMAGES_PER_CALL = (1, 4)
# Pages that one call copies per shard: the last page of a prompt, for each sequence that shares it.
PAGE_COPIES = 16


class DecodeProgram(NamedTuple):
    """A decode call for `num_seqs` sequences of each shard."""

    num_seqs: int


class PrefillProgram(NamedTuple):
    """A chunk of `num_tokens` tokens of each shard, with or without image places."""

    num_tokens: int
    has_images: bool


class EncodeProgram(NamedTuple):
    """A call of the vision tower for `num_images` squares with sides of `image_size` pixels."""

    num_images: int
    image_size: int


class CopyProgram(NamedTuple):
    """Copies of `PAGE_COPIES` pages."""


Program = DecodeProgram | PrefillProgram | EncodeProgram | CopyProgram


@dataclasses.dataclass(frozen=True)
class BucketTable:
    """All sizes of an engine's calls, the smallest first. Sequences and tokens are counted per shard.

    Attributes:
      seqs: Sequences of a decode call, powers of two.
      chunks: Tokens of a chunk without image places.
      image_chunks: Tokens of a chunk with image places; each has as many rows of features.
      images: Squares in one call of the vision tower, over all its shards.
      image_sizes: Their sides in pixels; empty for a text-only model.
      max_pages: Width of all page tables.
      max_steps: The most tokens per sequence that a decode call has room for.
      num_shards: Shards of the cache.
    """

    seqs: tuple[int, ...]
    chunks: tuple[int, ...]
    image_chunks: tuple[int, ...]
    images: tuple[int, ...]
    image_sizes: tuple[int, ...]
    max_pages: int
    max_steps: int
    num_shards: int

    @classmethod
    def of(
        cls,
        config: EngineConfig,
        *,
        max_pages: int,
        num_shards: int = 1,
        num_image_shards: int = 1,
        image_sizes: Iterable[int] = (),
    ) -> Self:
        """The sizes that an engine needs.

        Args:
          config: Its settings; `max_num_seqs` and `max_num_batched_tokens` are divided among the shards.
          max_pages: Pages of the longest sequence.
          num_shards: Shards of the cache.
          num_image_shards: Shards of a call of the vision tower.
          image_sizes: Sides of views and windows in pixels.
        """
        max_num_seqs = max(1, config.max_num_seqs // num_shards)
        max_num_tokens = max(1, config.max_num_batched_tokens // num_shards)
        return cls(
            # The batch never has more, even where this is not a power of two.
            seqs=tuple(size for size in _double(1, max_num_seqs) if power_of_two(size) == size),
            chunks=_double(MIN_CHUNK_TOKENS, max_num_tokens),
            image_chunks=_double(min(MIN_IMAGE_CHUNK_TOKENS, max_num_tokens), max_num_tokens),
            images=tuple(count * num_image_shards for count in IMAGES_PER_CALL),
            image_sizes=tuple(dict.fromkeys(image_sizes)),
            max_pages=max_pages,
            max_steps=max(STEPS_PER_CALL, power_of_two(config.stream_interval)),
            num_shards=num_shards,
        )

    @property
    def max_num_seqs(self) -> int:
        """Most sequences of a shard."""
        return self.seqs[-1]

    @property
    def max_num_batched_tokens(self) -> int:
        """Most tokens of a chunk."""
        return self.chunks[-1]

    def fit_seqs(self, count: int) -> int:
        """The size of a decode call for this many sequences."""
        return fit(count, self.seqs)

    def fit_chunk(self, num_tokens: int, *, has_images: bool) -> int:
        """The size of a chunk for this many tokens."""
        return fit(num_tokens, self.image_chunks if has_images else self.chunks)

    def programs(self) -> tuple[Program, ...]:
        """All programs. Those of the vision tower come first: their features go into chunks."""
        programs: list[Program] = [EncodeProgram(count, size) for size in self.image_sizes for count in self.images]
        programs += [PrefillProgram(size, has_images=False) for size in self.chunks]
        if self.image_sizes:
            programs += [PrefillProgram(size, has_images=True) for size in self.image_chunks]
        programs += [DecodeProgram(size) for size in self.seqs]
        return (*programs, CopyProgram())


def fit(size: int, sizes: Sequence[int]) -> int:
    """The first of `sizes`, in ascending order, that holds `size`.

    Raises:
      ValueError: If none does.
    """
    for largest in sizes:
        if size <= largest:
            return largest
    raise ValueError(f"{size} is given, and at most {sizes[-1]} is allowed")


def split_images(count: int, sizes: Sequence[int]) -> list[int]:
    """How many squares each call takes, with these call sizes and little padding: 7 with sizes 1 and 4 gives 4 and 3."""
    parts = []
    smallest, largest = sizes[0], sizes[-1]
    while count > 0:
        # Half of a large call costs as much as two small ones.
        part = min(count, largest if 2 * count > largest else smallest)
        parts.append(part)
        count -= part
    return parts


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`; 1 for 0."""
    return 1 << max(size - 1, 0).bit_length()


def _double(smallest: int, largest: int) -> tuple[int, ...]:
    """`smallest` doubled repeatedly, then `largest`, which may be below it."""
    sizes = []
    while smallest < largest:
        sizes.append(smallest)
        smallest *= 2
    return (*sizes, largest)
