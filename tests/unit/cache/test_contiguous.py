"""Buckets and shapes of the contiguous cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from step3_jax.cache.contiguous import bucket, cache_bytes, empty_cache, extend_cache
from step3_jax.config import TextConfig

CONFIG = TextConfig(num_hidden_layers=3, head_dim=4, moe_layers=())


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


def test_extension_keeps_rows_and_adds_zeros() -> None:
    cache = jax.tree.map(lambda rows: rows + 1, empty_cache(CONFIG, 2, 5, jnp.dtype("bfloat16")))
    longer = extend_cache(cache, 8)
    assert len(longer) == 3
    assert longer[2].keys.shape == longer[0].values.shape == (2, 8, 4)
    assert longer[0].keys.dtype == jnp.dtype("bfloat16")
    np.testing.assert_array_equal(np.asarray(longer[1].values[0, :, 0], np.float32), [1, 1, 1, 1, 1, 0, 0, 0])


def test_memory_is_that_of_the_arrays() -> None:
    cache = empty_cache(CONFIG, 2, 5, jnp.dtype("bfloat16"))
    assert cache_bytes(CONFIG, 2, 5, jnp.dtype("bfloat16")) == sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
