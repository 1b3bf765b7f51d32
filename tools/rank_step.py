"""One decode step of one of eight ranks at full depth, on the kernels: weights of one GPU, all 61 layers.

Attention is data-parallel (each rank has its own sequences, and all attention weights), routed experts are spread over
the ranks (6 of 48 each), the shared expert, dense layers and the head are cut in eight. What the ranks would exchange is
copied locally: the group's tokens are this rank's own, eight times, with the chosen experts turned by one rank's share
each time, so that every pair falls on this rank's experts exactly once; the eight parts of the sum are then added. So
the bytes and the arithmetic are a rank's, the network is left out, and the tokens mean nothing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.common import Implementation
from pallas_kernels.fp8_matmul.api import fp8_matmul
from pallas_kernels.grouped_matmul.api import moe_ffn
from pallas_kernels.mfa_decode.api import mfa_decode
from pallas_kernels.norm_quantise.api import norm_quantise
from pallas_kernels.pages import KVPages
from pallas_kernels.quantise import quantise_rows
from pallas_kernels.rope_cache_write.api import rope_cache_write
from pallas_kernels.swiglu_quantise.api import swiglu_quantise
from tools.rank_weights import FeedForward, RankSizes, RankState, RankWeights, Scaled


def decode_step(
    weights: RankWeights,
    state: RankState,
    table: jax.Array,
    sizes: RankSizes,
    *,
    implementation: Implementation = "auto",
) -> RankState:
    """One token for each sequence.

    Args:
      weights: From `make_weights`.
      state: Before the step; give it up (`donate_argnums`), else the cache is copied.
      table: Pages of each sequence in a layer, [B, max_pages]; layer i's lie i * `layer_pages` further on.
      sizes: Static.
      implementation: Of every kernel in it.
    """
    positions = state.lengths
    frequencies = 5e5 ** (-jnp.arange(0, sizes.head_dim, 2, dtype=jnp.float32) / sizes.head_dim)
    angles = positions.astype(jnp.float32)[:, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    page = jnp.take_along_axis(table, (positions // sizes.page_size)[:, None], axis=1)[:, 0]
    slot = positions % sizes.page_size
    lengths = positions + 1
    x = weights.embedding[state.tokens]

    def attend(layer: jax.Array, x: jax.Array, pages: KVPages) -> tuple[jax.Array, KVPages]:
        part = weights.attention
        first_page = layer * sizes.layer_pages
        rows, scales = norm_quantise(
            x, part.input_norm[layer], eps=1e-5, scales_layout="columns", implementation=implementation
        )
        low = _matmul(rows, scales, part.down, layer, implementation)
        query, key, value = jnp.split(low, [sizes.query_rank, sizes.query_rank + sizes.head_dim], axis=1)
        rows, scales = norm_quantise(
            query, part.query_norm[layer], eps=1e-5, scales_layout="columns", implementation=implementation
        )
        queries = _matmul(rows, scales, part.up, layer, implementation)
        queries = queries.reshape(sizes.batch, sizes.num_heads, sizes.head_dim)
        queries, pages = rope_cache_write(
            queries, key, value, cos, sin, pages, page + first_page, slot, implementation=implementation
        )
        heads = mfa_decode(queries[:, None], pages, table + first_page, lengths, implementation=implementation)
        rows, scales = quantise_rows(heads.reshape(sizes.batch, -1), scales_layout="columns")
        return x + _matmul(rows, scales, part.out, layer, implementation), pages

    def gather(rows: jax.Array) -> jax.Array:
        """The group's tokens: this rank's own, once for each rank."""
        return jnp.tile(rows, (sizes.num_ranks, 1))

    def scatter(parts: jax.Array) -> jax.Array:
        """The sum of all ranks' parts of this rank's tokens."""
        return parts.reshape(sizes.num_ranks, sizes.batch, -1).astype(jnp.float32).sum(0).astype(parts.dtype)

    def feed_forward(rows: jax.Array, scales: jax.Array, part: FeedForward, layer: jax.Array) -> jax.Array:
        inner = _matmul(rows, scales, part.gate_up, layer, implementation, "rows")
        rows, scales = swiglu_quantise(inner, scales_layout="columns", implementation=implementation)
        return _matmul(rows, scales, part.down, layer, implementation)

    def run_dense(index: jax.Array, carry: tuple[jax.Array, KVPages]) -> tuple[jax.Array, KVPages]:
        # The dense layers are the first few and the last.
        layer = jnp.where(index < sizes.first_dense, index, index + sizes.num_moe)
        x, pages = attend(layer, *carry)
        rows, scales = norm_quantise(x, weights.attention.post_norm[layer], eps=1e-5, implementation=implementation)
        return x + scatter(feed_forward(gather(rows), gather(scales), weights.dense, index)), pages

    def run_moe(index: jax.Array, carry: tuple[jax.Array, KVPages]) -> tuple[jax.Array, KVPages]:
        layer = index + sizes.first_dense
        x, pages = attend(layer, *carry)
        rows, scales, normed = norm_quantise(
            x, weights.attention.post_norm[layer], eps=1e-5, with_normed=True, implementation=implementation
        )
        # The product in float32: in bfloat16 the third and fourth expert often tie.
        logits = jnp.einsum(
            "BD,ED->BE", normed.astype(jnp.float32), weights.experts.router[index], precision=lax.Precision.HIGHEST
        )
        mixing, experts = lax.top_k(jax.nn.softmax(logits), sizes.top_k)
        turns = jnp.repeat(jnp.arange(sizes.num_ranks) * sizes.rank_experts, sizes.batch)
        experts = (gather(experts.astype(jnp.int32)) + turns[:, None]) % sizes.num_experts
        routed = moe_ffn(
            gather(normed),
            gather(mixing),
            experts,
            weights.experts.gate,
            weights.experts.up,
            weights.experts.down,
            all_experts=sizes.num_experts,
            layer=index,
            implementation=implementation,
        )
        shared = feed_forward(gather(rows), gather(scales), weights.shared, index)
        return x + scatter(routed + shared), pages

    carry = lax.fori_loop(0, sizes.first_dense, run_dense, (x, state.pages))
    carry = lax.fori_loop(0, sizes.num_moe, run_moe, carry)
    x, pages = lax.fori_loop(sizes.first_dense, sizes.num_dense, run_dense, carry)
    wide = x.astype(jnp.float32)
    normed = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-5)
    normed = normed.astype(x.dtype) * weights.last_norm
    logits = lax.dot_general(gather(normed), weights.head, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    # The best of this rank's share of the vocabulary.
    tokens = jnp.argmax(logits, axis=1).astype(jnp.int32)[: sizes.batch]
    return RankState(tokens, lengths, pages)


def decode_steps(
    weights: RankWeights,
    state: RankState,
    table: jax.Array,
    count: jax.Array,
    sizes: RankSizes,
    *,
    implementation: Implementation = "auto",
) -> RankState:
    """`count` steps in one program: what the host adds to a step shows in the difference."""
    return lax.fori_loop(
        0, count, lambda _, now: decode_step(weights, now, table, sizes, implementation=implementation), state
    )


def _matmul(
    rows: jax.Array,
    scales: jax.Array,
    weight: Scaled,
    layer: jax.Array,
    implementation: Implementation,
    scales_layout: str = "columns",
) -> jax.Array:
    return fp8_matmul(rows, scales, *weight, layer=layer, scales_layout=scales_layout, implementation=implementation)
