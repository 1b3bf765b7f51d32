"""`rope_cache_write`: writes the keys and values of a decode or prefill step to the cache, and rotates its queries."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.common import Implementation, dispatch
from pallas_kernels.pages import KVPages
from pallas_kernels.rope_cache_write import mosaic, reference


def rope_cache_write(
    queries: Float[Array, "N H K"],
    keys: Float[Array, "N key_columns"],
    values: Float[Array, "N value_columns"],
    cos: Float[Array, "N half"],
    sin: Float[Array, "N half"],
    pages: KVPages,
    page_ids: Int[Array, " N"],
    slots: Int[Array, " N"],
    *,
    first_page: Int[Array, ""] | int = 0,
    key_at: int = 0,
    value_at: int = 0,
    query_dtype: jax.typing.DTypeLike | None = None,
    implementation: Implementation = "auto",
) -> tuple[Float[Array, "N H K"], KVPages]:
    """Rotates queries and keys, and writes keys and values to their places in the paged cache.

    Rotation, neox style, pair (i, i + K/2): (a, b) -> (a cos - b sin, b cos + a sin), cosine and sine cast to the dtype
    of the rows first. A page is written in place if the caller donates it (`donate_argnums`, or the carry of a
    loop); otherwise XLA copies the cache first. The kernel supports bfloat16 queries of a multiple of 64 heads of 256, and
    bfloat16 and fp8 pages; XLA handles the rest, also in place (docs/kernels.md compares both).

    Args:
      queries: Before rotation.
      keys: One key per token, before rotation, in the K columns from `key_at` on: there may be more, such as other parts of
        a joined product. The kernel reads them in place.
      values: One value per token likewise, from `value_at` on.
      cos: Cosine of position * theta^(-2i/K), i < K/2.
      sin: Sine of the same.
      pages: One layer's cache, or that of all layers in one pool.
      page_ids: Page of each token, relative to `first_page`; nothing is written for a token whose id is negative, or whose
        page is outside the pool.
      slots: Row in that page, in [0, page). Two tokens of one call must not share a place.
      first_page: Added to every page id: where a layer's pages start in the pool; may be traced. The kernel adds it.
      key_at, value_at: First column of the keys and of the values in their arrays.
      query_dtype: Dtype of the rotated queries; their own if None. `mfa_decode` multiplies float16 with fp8 pages: it
        then need not convert.
      implementation: See `Implementation`.

    Returns:
      Rotated queries, and the pages.

    Raises:
      ValueError: If the head sizes of rows, tables and pages do not fit together.
      NotImplementedError: If the kernel is requested by name and cannot serve; the message says why.
    """
    head_dim = queries.shape[-1]
    ends = (key_at + head_dim, value_at + head_dim)
    if (
        2 * cos.shape[-1] != head_dim
        or min(key_at, value_at) < 0
        or keys.shape[-1] < ends[0]
        or values.shape[-1] < ends[1]
    ):
        raise ValueError(
            f"queries have head size {head_dim}, keys {keys.shape[-1]} columns from {key_at} on, values "
            f"{values.shape[-1]} from {value_at} on and cos {cos.shape[-1]}: keys and values need a head's columns, and cos "
            "and sin half of them"
        )
    if pages.head_dim != head_dim:
        raise ValueError(
            f"the pages hold heads of {pages.head_dim}, but the rows have {head_dim}: make pages of {head_dim}"
        )
    if not jnp.issubdtype(page_ids.dtype, jnp.integer) or not jnp.issubdtype(slots.dtype, jnp.integer):
        raise ValueError(f"page_ids ({page_ids.dtype}) and slots ({slots.dtype}) must be integers")
    wanted = jnp.dtype(queries.dtype if query_dtype is None else query_dtype)
    options = {"key_at": key_at, "value_at": value_at, "query_dtype": wanted}
    return dispatch(
        implementation,
        mosaic.unsupported(queries, pages, wanted),
        functools.partial(reference.rope_cache_write, **options),
        functools.partial(mosaic.rope_cache_write, **options),
        queries,
        keys,
        values,
        cos,
        sin,
        pages,
        page_ids,
        slots,
        jnp.asarray(first_page, jnp.int32),
    )
