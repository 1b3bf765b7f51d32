"""The KV cache as bytes: the formats that it may be kept in, and what a token takes."""

from __future__ import annotations

from typing import cast

from pallas_kernels.storage import INT4_GROUP, PAGE_SIZE, STORAGES, Storage, bytes_per_token
from step3_jax.config import TextConfig

__all__ = ["INT4_GROUP", "KV_CACHE_DTYPES", "PAGE_SIZE", "count_pages", "kv_bytes_per_token"]

KV_CACHE_DTYPES: tuple[str, ...] = STORAGES


def kv_bytes_per_token(text: TextConfig, kv_cache: str) -> int:
    """Cache of one token in all layers: keys and values of one head, with their scales.

    Args:
      text: The decoder's sizes.
      kv_cache: One of `KV_CACHE_DTYPES`.

    Raises:
      ValueError: For a format that does not exist, or heads that int4 cannot cut in groups.
    """
    if kv_cache not in KV_CACHE_DTYPES:
        raise ValueError(f"kv_cache is {kv_cache!r}; allowed: {', '.join(KV_CACHE_DTYPES)}")
    try:
        return bytes_per_token(text.head_dim, cast(Storage, kv_cache)) * text.num_hidden_layers
    except ValueError as error:
        raise ValueError(f"kv_cache {kv_cache}: {error}") from None


def count_pages(num_tokens: int) -> int:
    """Pages that so many tokens of one sequence take."""
    return -(-num_tokens // PAGE_SIZE)
