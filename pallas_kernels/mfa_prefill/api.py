"""Attention of many query tokens: the public functions."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.common import Implementation, dispatch
from pallas_kernels.mfa_prefill import dense, mosaic, reference
from pallas_kernels.pages import CachedTokens


def mfa_prefill(
    queries: Float[Array, "N H K"],
    cached: CachedTokens,
    query_starts: Int[Array, " starts"],
    *,
    scale: float | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "N H K"]:
    """Causal attention of the newest tokens of several sequences to their cached keys and values.

    Token i of sequence b's n_b = query_starts[b + 1] - query_starts[b] stands at position p = lengths[b] - n_b + i, and

        out = softmax(scale * q k_0..p^T) v_0..p,

    with scores and softmax in float32; the H heads share one key/value head. Whole prompts (n_b = lengths[b]), chunks
    behind a cached prefix (n_b < lengths[b]) and absent sequences (n_b = 0) may stand side by side.

    The kernel computes 4 K H p FLOPs a token in 16 bits: bfloat16, or float16 with an fp8 cache, whose scales are
    folded into scores and weights. An int4 cache is decoded to bfloat16 first, for the whole width of the table.

    Args:
      queries: Packed tokens, one sequence behind the other, with the rotary embedding applied.
      cached: What the sequences have, the rows of these tokens written already; `lengths` in [n_b, max_pages * page].
      query_starts: B + 1 row numbers that rise from 0; sequence b has the rows query_starts[b] to query_starts[b + 1].
        Rows behind the last of them are padding and come out as zeros.
      scale: K^-0.5 if None.
      implementation: See `pallas_kernels.common.dispatch`.

    Returns:
      Heads in the dtype of `queries`.

    Raises:
      ValueError: If shapes do not fit each other.
      NotImplementedError: If the kernel is asked for by name and cannot serve.
    """
    pages, table, lengths, first_page = cached
    batch = table.shape[0]
    if queries.shape[-1] != pages.head_dim:
        raise ValueError(f"queries have heads of {queries.shape[-1]}, the cache has rows of {pages.head_dim}")
    if query_starts.shape[0] != batch + 1:
        raise ValueError(
            f"query_starts has {query_starts.shape[0]} entries for {batch} sequences; {batch + 1} are needed: "
            "the first row of each, and the end of the last"
        )
    if queries.shape[0] == 0 or batch == 0 or table.shape[1] == 0:
        return jnp.zeros_like(queries)
    scale = queries.shape[-1] ** -0.5 if scale is None else scale
    return dispatch(
        implementation,
        mosaic.unsupported(queries, pages),
        functools.partial(reference.mfa_prefill, scale=scale),
        functools.partial(mosaic.mfa_prefill, scale=scale),
        queries,
        pages,
        table + first_page,
        query_starts,
        lengths,
    )


def dense_attention(
    queries: Float[Array, "B T H K"],
    keys: Float[Array, "B S G K"],
    values: Float[Array, "B S G K"],
    *,
    lengths: Int[Array, " B"] | None = None,
    causal: bool = False,
    scale: float | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "B T H K"]:
    """softmax(scale * q k^T) v without a cache; head h reads key/value head h // (H / G).

    The vision tower's attention: 16 heads of 112 over 2,708 or 1,300 tokens, each of which sees all.

    Args:
      queries: T query tokens.
      keys, values: S tokens of G heads; G divides H.
      lengths: Tokens of each sequence that are seen, in [0, S]; all if None. The rest may hold anything. A sequence of
        length 0 comes out as zeros.
      causal: Query t sees the tokens 0..t alone.
      scale: K^-0.5 if None.
      implementation: See `pallas_kernels.common.dispatch`.

    Returns:
      Heads in the dtype of `queries`.

    Raises:
      ValueError: If G does not divide H.
      NotImplementedError: If the kernel is asked for by name and cannot serve.
    """
    num_heads, groups = queries.shape[2], keys.shape[2]
    if groups == 0 or num_heads % groups:
        raise ValueError(f"{groups} key/value heads do not divide {num_heads} query heads")
    if queries.size == 0 or keys.shape[1] == 0:
        return jnp.zeros_like(queries)
    scale = queries.shape[-1] ** -0.5 if scale is None else scale
    return dispatch(
        implementation,
        dense.unsupported(queries, keys),
        functools.partial(reference.dense_attention, causal=causal, scale=scale),
        functools.partial(dense.dense_attention, causal=causal, scale=scale),
        queries,
        keys,
        values,
        lengths,
    )
