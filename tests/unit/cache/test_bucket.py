"""Bucket sizes."""

from __future__ import annotations

import pytest

from step3_jax.cache.bucket import bucket, power_of_two


@pytest.mark.parametrize(
    ("size", "length"), [(1, 64), (64, 64), (65, 128), (129, 256), (256, 256), (257, 300), (300, 300)]
)
def test_buckets_are_powers_of_two_up_to_the_limit(size: int, length: int) -> None:
    assert bucket(size, 64, 300) == length


def test_a_limit_below_the_smallest_bucket_holds() -> None:
    assert bucket(5, 64, 40) == 40


def test_more_than_the_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="301 tokens are given, more than the 300"):
        bucket(301, 64, 300)


def test_powers_of_two_hold_their_size() -> None:
    assert [power_of_two(size) for size in (0, 1, 2, 3, 4, 5, 64, 65)] == [1, 1, 2, 4, 4, 8, 64, 128]
