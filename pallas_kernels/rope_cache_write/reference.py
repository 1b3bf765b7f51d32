"""Plain JAX: what `rope_cache_write` means."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.pages import KVPages, write_rows


def rotate(
    heads: Float[Array, "N *heads K"],
    cos: Float[Array, "N half"],
    sin: Float[Array, "N half"],
    dtype: jnp.dtype | None = None,
) -> Float[Array, "N *heads K"]:
    """Neox style, pair (i, i + K/2); cosine and sine are cast to the dtype of `heads` first.

    Computed in float32 and rounded once, to `dtype` or to that of `heads`, as the kernel does.
    """
    shape = cos.shape[:1] + (1,) * (heads.ndim - 2) + cos.shape[-1:]
    cos, sin = (table.reshape(shape).astype(heads.dtype).astype(jnp.float32) for table in (cos, sin))
    first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)
    # Stacked, not concatenated: XLA:CPU then writes both halves in one loop, in a quarter of the time.
    rotated = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-2)
    return rotated.reshape(heads.shape).astype(heads.dtype if dtype is None else dtype)


def rope_cache_write(
    queries: Float[Array, "N H K"],
    keys: Float[Array, "N key_columns"],
    values: Float[Array, "N value_columns"],
    cos: Float[Array, "N half"],
    sin: Float[Array, "N half"],
    pages: KVPages,
    page_ids: Int[Array, " N"],
    slots: Int[Array, " N"],
    first_page: Int[Array, ""] | int = 0,
    *,
    key_at: int,
    value_at: int,
    query_dtype: jnp.dtype,
) -> tuple[Float[Array, "N H K"], KVPages]:
    """See `api.rope_cache_write`."""
    # A scatter counts a negative index from the end, which would hit a page.
    page_ids = jnp.where(page_ids < 0, pages.keys.shape[0], page_ids + first_page)
    size = queries.shape[-1]
    keys, values = keys[:, key_at : key_at + size], values[:, value_at : value_at + size]
    written = write_rows(pages, rotate(keys, cos, sin), values, page_ids, slots)
    return rotate(queries, cos, sin, query_dtype), written
