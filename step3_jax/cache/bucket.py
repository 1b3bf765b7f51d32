"""Sizes that compiled programs come in: few of them, so that little is compiled and little is padding."""

from __future__ import annotations


def bucket(size: int, smallest: int, largest: int) -> int:
    """The power-of-two multiple of `smallest` that holds `size`, cut at `largest`.

    Raises:
      ValueError: If `size` is above `largest`.
    """
    if size > largest:
        raise ValueError(f"{size} tokens are given, more than the {largest} that are allowed")
    length = smallest
    while length < size:
        length *= 2
    return min(length, largest)


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`; 1 for 0."""
    return 1 << max(size - 1, 0).bit_length()
