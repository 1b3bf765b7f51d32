"""The KV cache of all layers: one pool of pages of 64 tokens, and one page table per sequence, shared by all layers.

A page number p < P means the same place in every layer: page p + layer * P of the pool. Writes to a number outside
the pool are dropped, which is where idle rows write to.
"""

from __future__ import annotations

from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.pages import KVPages, empty_pages
from pallas_kernels.storage import Storage, bytes_per_token
from step3_jax.config import TextConfig
from step3_jax.layout.page import KV_CACHE_CHOICES

# The pool of all layers. If it is sharded, each shard has P pages of every layer, layer after layer.
Cache = KVPages
# Stands for no cache, or none in this process.
NO_CACHE = cast(Cache, ())


def choose_storage(kv_cache_dtype: str, dtype: jnp.dtype, head_dim: int) -> Storage:
    """The format of the pages.

    Args:
      kv_cache_dtype: One of `KV_CACHE_CHOICES`; "auto" is that of the activations.
      dtype: The dtype of the activations.
      head_dim: K.

    Raises:
      ValueError: If there is no such format, or it cannot hold heads of this size.
    """
    if kv_cache_dtype not in KV_CACHE_CHOICES:
        raise ValueError(f"kv_cache_dtype is {kv_cache_dtype!r}; allowed: {', '.join(KV_CACHE_CHOICES)}")
    storage: Storage
    if kv_cache_dtype == "auto":
        storage = "bfloat16" if dtype == jnp.bfloat16 else "float32"
    else:
        storage = kv_cache_dtype  # type: ignore[assignment]
    try:
        bytes_per_token(head_dim, storage)
    except ValueError as error:
        raise ValueError(f"kv_cache_dtype is {kv_cache_dtype!r}: {error}; give fp8 or bfloat16") from None
    return storage


def empty_cache(config: TextConfig, num_pages: int, storage: Storage, *, as_bits: bool = False) -> Cache:
    """A pool of zeros.

    Args:
      config: Layers and head size.
      num_pages: P, pages per layer.
      storage: The format.
      as_bits: For CPUs, see `pallas_kernels.pages.empty_pages`.
    """
    return empty_pages(num_pages * config.num_hidden_layers, config.head_dim, storage, as_bits=as_bits)


def count_pages(cache: Cache, num_layers: int) -> int:
    """Pages per layer of the pool."""
    return cache.num_pages // num_layers


def copy_pages(cache: Cache, sources: Int[Array, " copies"], targets: Int[Array, " copies"], num_layers: int) -> Cache:
    """Copies pages in all layers; a target that is not a page drops its copy."""

    def copy(pool: Array) -> Array:
        pages = pool.reshape(num_layers, -1, *pool.shape[1:])
        copied = pages.at[:, targets].set(pages.at[:, sources].get(mode="clip"), mode="drop")
        return copied.reshape(pool.shape)

    return jax.tree.map(copy, cache)
