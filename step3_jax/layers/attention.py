"""MFA: attention with a low-rank query and one key/value head.

Alphabet of the project (one meaning each): B sequences · T query tokens · S cached tokens · D model width · H query heads
· K head size · R low-rank query · E experts · F expert width · V vocabulary · P pages · N tokens flattened over the
batch · L layers.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.common import Implementation
from pallas_kernels.mfa_decode import mfa_decode
from pallas_kernels.mfa_prefill import mfa_prefill
from pallas_kernels.pages import KVPages, write_rows
from pallas_kernels.storage import PAGE_SIZE
from step3_jax.config import TextConfig
from step3_jax.layers.linear import Linear
from step3_jax.layers.norm import RMSNorm
from step3_jax.layers.rope import apply_rope, rope_table

# A page that no cache has: what is written to it is dropped.
NO_PAGE = 2**30


class CacheStep(NamedTuple):
    """Where the tokens of one step stand in the paged cache.

    A decode step has T tokens of each sequence, the last T of its `lengths`. A chunk of prompts is packed: one row of N
    tokens, in which those of sequence b are [query_starts[b], query_starts[b + 1]), the last of its `lengths`; what
    stands behind query_starts[-1] is padding.

    Attributes:
      table: Page ids of each sequence in order; entries behind its last page may be any page.
      lengths: Tokens of each sequence in the cache once this step's are written; 0 for a row that is idle.
      query_starts: Of a chunk; None in a decode step.
      num_new: Of a decode step: how many of the T tokens of each sequence are its own. Those behind them are padding, whose
        keys and values are written nowhere. None: all of them are.
    """

    table: Int[Array, "B max_pages"]
    lengths: Int[Array, " B"]
    query_starts: Int[Array, " starts"] | None = None
    num_new: Int[Array, " B"] | None = None


class AttentionContext(NamedTuple):
    """What all layers of one step share.

    Attributes:
      cos, sin: Rotary table, [B, T, K/2].
      mask: Which tokens each token may see, [B, T, T]; None with a cache.
      step: Where the tokens stand in the cache; None without one.
      page_ids: Page that each new token is written to, [N]; `NO_PAGE` for none. None without a cache.
      slots: Its place in the page, [N]; None without a cache.
      first_page: Where the layer's pages start in the pool, from which the numbers above count; None for pages of one
        layer alone. See `at_layer`.
    """

    cos: Float[Array, "B T half"]
    sin: Float[Array, "B T half"]
    mask: Bool[Array, "B T T"] | None = None
    step: CacheStep | None = None
    page_ids: Int[Array, " N"] | None = None
    slots: Int[Array, " N"] | None = None
    first_page: Int[Array, ""] | int | None = None


class MFA(nnx.Module):
    """q = wq RMS(q_proj x), H heads; k, v = k_proj x, v_proj x, one head; o_proj(attention) (spec, section 4)."""

    def __init__(self, config: TextConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        hidden, head_dim, rank = config.hidden_size, config.head_dim, config.share_q_dim
        self.q_proj = Linear(hidden, rank, dtype=dtype, rngs=rngs)
        self.inter_norm = RMSNorm(rank, eps=config.rms_norm_eps, dtype=dtype)
        self.wq = Linear(rank, config.query_size, dtype=dtype, rngs=rngs)
        self.k_proj = Linear(hidden, head_dim, dtype=dtype, rngs=rngs)
        self.v_proj = Linear(hidden, head_dim, dtype=dtype, rngs=rngs)
        self.o_proj = Linear(config.query_size, hidden, dtype=dtype, rngs=rngs)
        self.num_heads = config.num_attention_heads
        self.head_dim = head_dim

    def __call__(
        self, hidden: Float[Array, "B T D"], context: AttentionContext, pages: KVPages | None = None
    ) -> tuple[Float[Array, "B T D"], KVPages | None]:
        """Attends to the cache (with the new rows written into it), or to `hidden` alone when `pages` is None.

        `pages` are the pool of all layers; the context says where this one's begin.
        """
        batch, length, _ = hidden.shape
        queries = self.wq(self.inter_norm(self.q_proj(hidden)))
        queries = apply_rope(queries.reshape(batch, length, self.num_heads, -1), context.cos, context.sin)
        keys = apply_rope(self.k_proj(hidden), context.cos, context.sin)
        values = self.v_proj(hidden)
        if pages is None:
            heads = attend(queries, keys, values, context.mask)
        else:
            pages = write_tokens(pages, keys.reshape(-1, self.head_dim), values.reshape(-1, self.head_dim), context)
            heads = attend_pages(queries, pages, context)
        return self.o_proj(heads.reshape(batch, length, -1)), pages


def attention_context(
    config: TextConfig,
    shape: tuple[int, int],
    *,
    step: CacheStep | None = None,
    page_size: int = PAGE_SIZE,
    positions: Int[Array, "B T"] | None = None,
) -> AttentionContext:
    """Builds the context of a step of `shape` [B, T].

    Args:
      config: Head size and rotary base.
      shape: Sequences and query tokens; [1, N] for a chunk of prompts.
      step: Where the tokens stand in the cache; without one they see each other.
      page_size: Tokens of a page.
      positions: Rotary positions, if they are not the tokens' places in their sequences. Who sees whom goes by place,
        not by position.
    """
    batch, length = shape
    if step is None:
        order = jnp.arange(length, dtype=jnp.int32)
        if positions is None:
            positions = jnp.broadcast_to(order, shape)
        cos, sin = rope_table(positions, head_dim=config.head_dim, theta=config.rope_theta)
        return AttentionContext(cos, sin, jnp.broadcast_to(order <= order[:, None], (batch, length, length)))
    if step.query_starts is None:
        order = jnp.arange(length, dtype=jnp.int32)
        places = step.lengths[:, None] - length + order
        if step.num_new is not None:
            places = jnp.where(order < step.num_new[:, None], places, -1)
        places = places.reshape(-1)
        rows = jnp.repeat(jnp.arange(batch, dtype=jnp.int32), length)
    else:
        tokens = jnp.arange(length, dtype=jnp.int32)
        # The last sequence that begins at or before a token is the one it belongs to: empty ones have no tokens.
        rows = jnp.searchsorted(step.query_starts, tokens, side="right", method="compare_all").astype(jnp.int32) - 1
        rows = jnp.minimum(rows, step.lengths.shape[0] - 1)
        places = step.lengths[rows] - step.query_starts[rows + 1] + tokens
        places = jnp.where(tokens < step.query_starts[-1], places, -1)
    is_written = places >= 0
    places = jnp.maximum(places, 0)
    if positions is None:
        positions = places.reshape(shape)
    cos, sin = rope_table(positions, head_dim=config.head_dim, theta=config.rope_theta)
    page_ids = jnp.where(is_written, step.table[rows, places // page_size], NO_PAGE)
    return AttentionContext(cos, sin, step=step, page_ids=page_ids, slots=places % page_size)


def at_layer(context: AttentionContext, layer: Int[Array, ""] | int, layer_pages: int) -> AttentionContext:
    """The context for one layer of a pool in which each has `layer_pages` pages, one layer's behind the other's."""
    return context._replace(first_page=layer * layer_pages)


def write_tokens(
    pages: KVPages, keys: Float[Array, "N K"], values: Float[Array, "N K"], context: AttentionContext
) -> KVPages:
    """Writes the step's new rows to their pages; the caller sees to it that the table has them."""
    page_ids, slots = _shift(context.page_ids, context.first_page), context.slots
    if keys.shape[0] == 1 and jax.default_backend() == "cpu":
        # XLA:CPU merges a lone update into what reads the pages, and then copies all of them. Of two rows, the second
        # dropped, it makes a scatter in place.
        keys, values, slots = (jnp.repeat(array, 2, axis=0) for array in (keys, values, slots))
        page_ids = jnp.append(page_ids, NO_PAGE)
    return write_rows(pages, keys, values, page_ids, slots)


def attend_pages(
    queries: Float[Array, "B T H K"], pages: KVPages, context: AttentionContext
) -> Float[Array, "B T H K"]:
    """Attention of a decode step or of a packed chunk over the cache, which has the step's own rows already."""
    implementation: Implementation = "reference" if pages.is_bits else "auto"
    step = context.step
    table = _shift(step.table, context.first_page)
    if step.query_starts is None:
        return mfa_decode(queries, pages, table, step.lengths, implementation=implementation)
    heads = mfa_prefill(queries[0], pages, table, step.query_starts, step.lengths, implementation=implementation)
    return heads[None]


def _shift(page_ids: Int[Array, "..."], first_page: Int[Array, ""] | int | None) -> Int[Array, "..."]:
    """Page numbers of a layer as those of the pool; `NO_PAGE` stays far outside."""
    return page_ids if first_page is None else page_ids + first_page


def attend(
    queries: Float[Array, "B T H K"],
    keys: Float[Array, "B S K"],
    values: Float[Array, "B S K"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T H K"]:
    """softmax(q k^T / sqrt(K)) v with one key/value head; scores and softmax in float32.

    The heads share the keys, so both products are one matrix product of T*H rows for each sequence.
    """
    batch, length, heads, head_dim = queries.shape
    flat = queries.reshape(batch, length * heads, head_dim)
    scores = jnp.einsum("BQK,BSK->BQS", flat, keys, preferred_element_type=jnp.float32) * head_dim**-0.5
    scores = scores.reshape(batch, length, heads, -1)
    scores = jnp.where(mask[:, :, None, :], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype).reshape(batch, length * heads, -1)
    out = jnp.einsum("BQS,BSK->BQK", weights, values, preferred_element_type=jnp.float32)
    return out.astype(queries.dtype).reshape(queries.shape)
