"""The contiguous KV cache: for each layer one block of rows a sequence, its length a bucket."""

from __future__ import annotations

import jax.numpy as jnp

from step3_jax.config import TextConfig
from step3_jax.layers.attention import LayerKV

MIN_CACHE_LENGTH = 64


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


def empty_cache(config: TextConfig, batch_size: int, length: int, dtype: jnp.dtype) -> tuple[LayerKV, ...]:
    """Zeros, [B, S, K] for the keys and the values of each layer."""
    shape = (batch_size, length, config.head_dim)
    return tuple(LayerKV(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_hidden_layers))


def extend_cache(cache: tuple[LayerKV, ...], length: int) -> tuple[LayerKV, ...]:
    """The same cache with room for `length` tokens of each sequence."""
    rows = ((0, 0), (0, length - cache[0].keys.shape[1]), (0, 0))
    return tuple(LayerKV(jnp.pad(kv.keys, rows), jnp.pad(kv.values, rows)) for kv in cache)


def cache_bytes(config: TextConfig, batch_size: int, length: int, dtype: jnp.dtype) -> int:
    """Memory of a cache, in bytes: keys and values of one head in each layer."""
    return 2 * config.num_hidden_layers * batch_size * length * config.head_dim * jnp.dtype(dtype).itemsize
