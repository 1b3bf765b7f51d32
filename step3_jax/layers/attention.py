"""MFA: attention with a low-rank query and one key/value head.

Alphabet of the project (one meaning each): B sequences · T query tokens · S cached tokens · D model width · H query heads
· K head size · R low-rank query · E experts · F expert width · V vocabulary · P pages · N tokens flattened over the
batch · L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.common import Implementation
from pallas_kernels.mfa_decode import KERNEL_STORAGES, Plan, mfa_decode, mfa_decode_quantised, plan_decode
from pallas_kernels.mfa_prefill import mfa_prefill
from pallas_kernels.pages import CachedTokens, KVPages
from pallas_kernels.rope_cache_write import rope_cache_write
from pallas_kernels.storage import PAGE_SIZE
from step3_jax.config import TextConfig
from step3_jax.cpu_kernels.api import attend as attend_on_cpu
from step3_jax.cpu_kernels.api import attends
from step3_jax.cpu_kernels.loader import Kernels
from step3_jax.layers.linear import Linear, project
from step3_jax.layers.norm import RMSNorm
from step3_jax.layers.rope import apply_rope, rope_table
from step3_jax.layers.rows import Rows

# A page that no cache has: writes to it are dropped.
NO_PAGE = 2**30


class CacheStep(NamedTuple):
    """The positions of one step's tokens in the paged cache.

    A decode step has T tokens of each sequence, the last T of its `lengths`. A chunk of prompts is packed: one row of N
    tokens, in which those of sequence b are [query_starts[b], query_starts[b + 1]), the last of its `lengths`; rows
    from query_starts[-1] on are padding.

    Attributes:
      table: Page ids of each sequence in order; entries after its last page may be any page.
      lengths: Tokens of each sequence in the cache once this step's are written; 0 for an idle row.
      query_starts: Row starts of a chunk; None in a decode step.
      num_new: In a decode step, how many of the T tokens of each sequence are new, the last ones. Those before them are
        padding, whose keys and values are not written. None: all of them are new.
    """

    table: Int[Array, "B max_pages"]
    lengths: Int[Array, " B"]
    query_starts: Int[Array, " starts"] | None = None
    num_new: Int[Array, " B"] | None = None

    def count_filled(self, length: int) -> Int[Array, ""]:
        """Of the step's tokens, [B, `length`] row by row, those before the padding or the idle rows at the end."""
        if self.query_starts is not None:
            return self.query_starts[-1]
        places = jnp.arange(1, self.lengths.shape[0] + 1)
        return length * jnp.max(jnp.where(self.lengths > 0, places, 0))


class AttentionContext(NamedTuple):
    """Shared by all layers of one step.

    Attributes:
      cos, sin: Rotary table, [B, T, K/2].
      mask: Which tokens each token may see, [B, T, T]; None with a cache.
      step: The tokens' positions in the cache; None without one.
      page_ids: Page that each new token is written to, [N]; `NO_PAGE` for none. None without a cache.
      slots: Its place in the page, [N]; None without a cache.
      first_page: Where the layer's pages start in the pool; the numbers above are relative to it. None for pages of a
        single layer. See `at_layer`.
      plan: In a decode step, what each worker reads: the same in all layers. None if each makes its own. See `with_plan`.
    """

    cos: Float[Array, "B T half"]
    sin: Float[Array, "B T half"]
    mask: Bool[Array, "B T T"] | None = None
    step: CacheStep | None = None
    page_ids: Int[Array, " N"] | None = None
    slots: Int[Array, " N"] | None = None
    first_page: Int[Array, ""] | int | None = None
    plan: Plan | None = None


class MFA(nnx.Module):
    """q = wq RMS(q_proj x), H heads; k, v = k_proj x, v_proj x, one head; o_proj(attention).

    Attributes:
      qkv_down_proj: The three products of x joined into one, replacing them, if `model.fuse.fuse` has done so.
      cpu_kernels: Compute attention of decode steps, if `model.cpu` has set them.
    """

    def __init__(self, config: TextConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        hidden, head_dim, rank = config.hidden_size, config.head_dim, config.share_q_dim
        self.q_proj: Linear | None = Linear(hidden, rank, dtype=dtype, rngs=rngs)
        self.inter_norm = RMSNorm(rank, eps=config.rms_norm_eps, dtype=dtype)
        self.wq = Linear(rank, config.query_size, dtype=dtype, rngs=rngs)
        self.k_proj: Linear | None = Linear(hidden, head_dim, dtype=dtype, rngs=rngs)
        self.v_proj: Linear | None = Linear(hidden, head_dim, dtype=dtype, rngs=rngs)
        self.qkv_down_proj: Linear | None = nnx.data(None)
        self.o_proj = Linear(config.query_size, hidden, dtype=dtype, rngs=rngs)
        self.num_heads = config.num_attention_heads
        self.head_dim = head_dim
        self.cpu_kernels: Kernels | None = None

    @property
    def takes_rows(self) -> bool:
        """Whether its first products multiply quantised rows."""
        first = (self.qkv_down_proj,) if self.qkv_down_proj is not None else (self.q_proj, self.k_proj, self.v_proj)
        return all(projection is not None and projection.takes_rows for projection in first)

    def __call__(
        self, hidden: Float[Array, "B T D"] | Rows, context: AttentionContext, pages: KVPages | None = None
    ) -> tuple[Float[Array, "B T D"], KVPages | None]:
        """Attends to the cache (with the new rows written into it), or only to `hidden` if `pages` is None.

        `pages` are the pool of all layers; the context says where this one's start.
        """
        batch, length, half = context.cos.shape
        low, keys, values = self._project(hidden)
        queries = self.wq(self.inter_norm(low.reshape(batch * length, -1)))
        queries = queries.reshape(batch, length, self.num_heads, self.head_dim)
        if pages is None:
            own_keys, own_values = (columns.take().reshape(batch, length, -1) for columns in (keys, values))
            queries, own_keys = (apply_rope(rows, context.cos, context.sin) for rows in (queries, own_keys))
            heads: Float[Array, "B T H K"] | Rows = attend(queries, own_keys, own_values, context.mask)
        else:
            is_decode = context.step.query_starts is None
            rotated, pages = rope_cache_write(
                queries.reshape(batch * length, self.num_heads, -1),
                keys.array,
                values.array,
                context.cos.reshape(-1, half),
                context.sin.reshape(-1, half),
                pages,
                context.page_ids,
                context.slots,
                first_page=_first_page(context),
                key_at=keys.start,
                value_at=values.start,
                query_dtype=query_dtype(queries.dtype, pages) if is_decode else None,
                implementation=_implementation(pages),
            )
            heads = attend_pages(
                rotated.reshape(queries.shape),
                pages,
                context,
                dtype=queries.dtype,
                quantise=self.o_proj.takes_rows,
                cpu_kernels=self.cpu_kernels,
            )
        heads = heads if isinstance(heads, Rows) else heads.reshape(batch, length, -1)
        return self.o_proj(heads).reshape(batch, length, -1), pages

    def scores(
        self, hidden: Float[Array, "B T D"], context: AttentionContext, heads: Sequence[int]
    ) -> Float[Array, "B T heads S"]:
        """Masked scores of some heads before the softmax, without a cache; for training that tells heads where to look."""
        assert context.mask is not None, "scores are of a sequence without a cache"
        batch, length, _ = context.cos.shape
        low, keys, _ = self._project(hidden)
        queries = self.wq(self.inter_norm(low.reshape(batch * length, -1)))
        queries = queries.reshape(batch, length, self.num_heads, self.head_dim)[:, :, jnp.asarray(heads)]
        queries = apply_rope(queries, context.cos, context.sin)
        own_keys = apply_rope(keys.take().reshape(batch, length, -1), context.cos, context.sin)
        scores = jnp.einsum("BTHK,BSK->BTHS", queries, own_keys) * self.head_dim**-0.5
        return jnp.where(context.mask[:, :, None, :], scores, jnp.finfo(jnp.float32).min)

    def _project(self, hidden: Float[Array, "B T D"] | Rows) -> tuple[Float[Array, "*batch low"], Columns, Columns]:
        """The low-rank query, which may have other columns after it, and where key and value are."""
        if self.qkv_down_proj is None:
            low, *parts = project(hidden, (self.q_proj, self.k_proj, self.v_proj))
            keys, values = (Columns(rows.reshape(-1, self.head_dim), 0, self.head_dim) for rows in parts)
            return low, keys, values
        joined = self.qkv_down_proj(hidden)
        joined = joined.reshape(-1, joined.shape[-1])
        first = joined.shape[1] - 2 * self.head_dim
        keys, values = (Columns(joined, start, self.head_dim) for start in (first, first + self.head_dim))
        return joined, keys, values


class Columns(NamedTuple):
    """Some columns of an array, not copied: a kernel reads them in place.

    Attributes:
      array: [N, columns].
      start: The first of them.
      size: How many.
    """

    array: Float[Array, "N columns"]
    start: int
    size: int

    def take(self) -> Float[Array, "N size"]:
        """The columns as a separate array."""
        return self.array[:, self.start : self.start + self.size]


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
      step: The tokens' positions in the cache; without one they see each other.
      page_size: Tokens per page.
      positions: Rotary positions, if they differ from the tokens' places in their sequences. The mask depends on the
        places, not on these.
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
            places = jnp.where(order >= length - step.num_new[:, None], places, -1)
        places = places.reshape(-1)
        rows = jnp.repeat(jnp.arange(batch, dtype=jnp.int32), length)
    else:
        tokens = jnp.arange(length, dtype=jnp.int32)
        # A token belongs to the last sequence that starts at or before it: empty ones have no tokens.
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
    """The context for one layer of a pool with `layer_pages` pages per layer, layer after layer."""
    return context._replace(first_page=layer * layer_pages)


def with_plan(context: AttentionContext, pages: KVPages | None, tokens: int, heads: int) -> AttentionContext:
    """The context of a decode step with the plan that divides its work among the attention kernel's workers, if any.

    Args:
      context: Of the step.
      pages: The cache; None without one.
      tokens: Tokens of each sequence.
      heads: Heads of each token on a device.
    """
    step = context.step
    if (
        pages is None
        or step is None
        or step.query_starts is not None
        or pages.is_bits
        or pages.storage not in KERNEL_STORAGES
    ):
        return context
    max_tokens = step.table.shape[1] * pages.page_size
    plan = plan_decode(step.lengths, tokens=tokens, heads=heads, storage=pages.storage, max_tokens=max_tokens)
    return context._replace(plan=plan)


def query_dtype(dtype: jnp.dtype, pages: KVPages) -> jnp.dtype:
    """The best dtype for rotated queries of a decode step: the one multiplied with these pages, if it is as wide."""
    is_half = dtype == jnp.bfloat16 and pages.storage == "fp8"
    return jnp.dtype(jnp.float16) if is_half else dtype


def attend_pages(
    queries: Float[Array, "B T H K"],
    pages: KVPages,
    context: AttentionContext,
    *,
    dtype: jnp.dtype | None = None,
    quantise: bool = False,
    cpu_kernels: Kernels | None = None,
) -> Float[Array, "B T H K"] | Rows:
    """Attention of a decode step or of a packed chunk over the cache, which has the step's own rows already.

    Args:
      queries: Rotated queries.
      pages: The pool of all layers.
      context: The context of the step and the layer.
      dtype: The dtype of the heads; that of the queries if None.
      quantise: Whether the heads of a decode step come out as quantised rows, one for each token.
      cpu_kernels: Compute a decode step whose pages they take and whose heads are not quantised.
    """
    step, wanted = context.step, queries.dtype if dtype is None else dtype
    cached = CachedTokens(pages, step.table, step.lengths, _first_page(context))
    implementation = _implementation(pages)
    if step.query_starts is not None:
        return mfa_prefill(queries[0], cached, step.query_starts, implementation=implementation)[None]
    if quantise:
        values, scales = mfa_decode_quantised(queries, cached, plan=context.plan, implementation=implementation)
        return Rows(values, scales, None, wanted)
    if cpu_kernels is not None and attends(pages):
        return attend_on_cpu(cpu_kernels, queries, cached).astype(wanted)
    return mfa_decode(queries, cached, plan=context.plan, out_dtype=wanted, implementation=implementation)


def _first_page(context: AttentionContext) -> Int[Array, ""] | int:
    return 0 if context.first_page is None else context.first_page


def _implementation(pages: KVPages) -> Implementation:
    """Kernels do not take pages of bits, which are for CPUs."""
    return "reference" if pages.is_bits else "auto"


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
