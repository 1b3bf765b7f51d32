"""The KV cache in bytes: its formats, and the size of a token."""

from __future__ import annotations

from typing import cast

from pallas_kernels.storage import INT4_GROUP, PAGE_SIZE, STORAGES, Storage, bytes_per_token
from step3_jax.config import TextConfig

__all__ = [
    "INT4_GROUP",
    "KV_CACHE_CHOICES",
    "KV_CACHE_DTYPES",
    "PAGE_SIZE",
    "count_pages",
    "kv_bytes_per_token",
    "page_bytes",
    "pages_for",
]

KV_CACHE_DTYPES: tuple[str, ...] = STORAGES
# The values of an engine's setting; "auto" is the dtype of the activations.
KV_CACHE_CHOICES = ("auto", *KV_CACHE_DTYPES)


def kv_bytes_per_token(text: TextConfig, kv_cache: str) -> int:
    """Cache of one token in all layers: keys and values of one head, with their scales.

    Args:
      text: The decoder's sizes.
      kv_cache: One of `KV_CACHE_DTYPES`.

    Raises:
      ValueError: For an unknown format, or heads that int4 cannot divide into groups.
    """
    if kv_cache not in KV_CACHE_DTYPES:
        raise ValueError(f"kv_cache is {kv_cache!r}; allowed: {', '.join(KV_CACHE_DTYPES)}")
    try:
        return bytes_per_token(text.head_dim, cast(Storage, kv_cache)) * text.num_hidden_layers
    except ValueError as error:
        raise ValueError(f"kv_cache {kv_cache}: {error}") from None


def page_bytes(text: TextConfig, kv_cache: str) -> int:
    """Memory of one page in all layers, in bytes; arguments as for `kv_bytes_per_token`."""
    return PAGE_SIZE * kv_bytes_per_token(text, kv_cache)


def pages_for(num_tokens: int) -> int:
    """Pages for this many tokens of one sequence."""
    return -(-num_tokens // PAGE_SIZE)


def count_pages(
    config: TextConfig, storage: str, *, max_model_len: int, max_num_seqs: int, memory_bytes: int | None
) -> int:
    """How many pages a cache gets: room for all sequences at full length, or as many as the memory holds.

    Args:
      config: Layers and head size.
      storage: Format of the pages.
      max_model_len: Tokens of the longest sequence.
      max_num_seqs: Sequences at once.
      memory_bytes: Limit for the cache; None for no limit.

    Raises:
      ValueError: If the memory does not hold one sequence at full length.
    """
    longest, size = pages_for(max_model_len), page_bytes(config, storage)
    wanted = max_num_seqs * longest
    if memory_bytes is None:
        return wanted
    if memory_bytes < longest * size:
        raise ValueError(
            f"the KV cache may take {max(memory_bytes, 0) / 2**20:.0f} MiB, but one sequence of max_model_len = "
            f"{max_model_len} tokens needs {longest * size / 2**20:.0f} MiB in {storage}: lower max_model_len, take a "
            "smaller kv_cache_dtype, or raise kv_cache_memory_bytes"
        )
    return min(wanted, memory_bytes // size)
