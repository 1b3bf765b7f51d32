"""Sizes and weights of one of eight ranks of Step3: what `rank_step` runs on."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.pages import KVPages, empty_pages
from pallas_kernels.storage import bytes_per_token

Scaled = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class RankSizes:
    """Sizes of the model, of the batch, and of a rank's share. Defaults are Step3's, 128 sequences of 4,096 tokens."""

    hidden: int = 7168
    query_rank: int = 2048
    num_heads: int = 64
    head_dim: int = 256
    num_layers: int = 61
    first_dense: int = 4
    last_dense: int = 1
    dense_width: int = 18_432
    num_experts: int = 48
    top_k: int = 3
    expert_width: int = 5120
    shared_width: int = 5120
    vocab: int = 128_815
    num_ranks: int = 8
    batch: int = 128
    context: int = 4096
    storage: str = "fp8"
    page_size: int = 64

    @property
    def num_dense(self) -> int:
        return self.first_dense + self.last_dense

    @property
    def num_moe(self) -> int:
        return self.num_layers - self.num_dense

    @property
    def rank_experts(self) -> int:
        return self.num_experts // self.num_ranks

    @property
    def group_batch(self) -> int:
        """Tokens of all ranks together."""
        return self.batch * self.num_ranks

    @property
    def rank_vocab(self) -> int:
        return -(-self.vocab // self.num_ranks)

    @property
    def layer_pages(self) -> int:
        """Pages of one layer: what is cached, and room for the new token."""
        return self.batch * -(-(self.context + 1) // self.page_size)

    @property
    def step_bytes(self) -> int:
        """The least that a step reads and writes: every weight once, every cached token once; activations not counted."""
        attention = self.hidden * (self.query_rank + 2 * self.head_dim)
        attention += (self.query_rank + self.hidden) * self.num_heads * self.head_dim
        shared = 3 * self.hidden * self.shared_width // self.num_ranks
        routed = 3 * self.rank_experts * self.hidden * self.expert_width + 4 * self.num_experts * self.hidden
        dense = 3 * self.hidden * self.dense_width // self.num_ranks
        cache = self.batch * self.context * bytes_per_token(self.head_dim, self.storage)
        return (
            self.num_layers * (attention + cache)
            + self.num_moe * (shared + routed)
            + self.num_dense * dense
            + 2 * self.rank_vocab * self.hidden
        )


class Attention(NamedTuple):
    """All layers' attention weights: norms [L, .] in bfloat16, the rest e4m3 with scales of 128 x 128 blocks."""

    input_norm: jax.Array
    query_norm: jax.Array
    post_norm: jax.Array
    # Low-rank query, key and value side by side: one product.
    down: Scaled
    up: Scaled
    out: Scaled


class FeedForward(NamedTuple):
    """Gate and up side by side, [., 2 F, D], and down, [., D, F], of this rank's share."""

    gate_up: Scaled
    down: Scaled


class Experts(NamedTuple):
    """Router [., E, D] in float32, and this rank's experts, [., E / 8, ., .]."""

    router: jax.Array
    gate: Scaled
    up: Scaled
    down: Scaled


class RankWeights(NamedTuple):
    """All that one rank holds."""

    embedding: jax.Array
    head: jax.Array
    last_norm: jax.Array
    attention: Attention
    dense: FeedForward
    shared: FeedForward
    experts: Experts


class RankState(NamedTuple):
    """What a step changes: last tokens [B], cached tokens [B], and all layers' pages in one pool."""

    tokens: jax.Array
    lengths: jax.Array
    pages: KVPages


def make_weights(sizes: RankSizes, seed: int = 0) -> RankWeights:
    """Random weights: e4m3 numbers of magnitude below 2, none of them NaN, and scales that keep the activations in range."""
    layers, hidden, heads = sizes.num_layers, sizes.hidden, sizes.num_heads * sizes.head_dim
    keys = iter(jax.random.split(jax.random.key(seed, impl="rbg"), 32))

    def norm(*shape: int) -> jax.Array:
        return jax.random.uniform(next(keys), shape, jnp.bfloat16, 0.5, 1.5)

    def plain(*shape: int, dtype: jnp.dtype = jnp.bfloat16) -> jax.Array:
        return jax.random.uniform(next(keys), shape, dtype, -1, 1) * jnp.asarray(shape[-1] ** -0.5, dtype)

    def scaled(*shape: int) -> Scaled:
        blocks = (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
        return _random_e4m3(next(keys), shape), jnp.full(blocks, shape[-1] ** -0.5, jnp.float32)

    def feed_forward(count: int, width: int) -> FeedForward:
        share = width // sizes.num_ranks
        return FeedForward(scaled(count, 2 * share, hidden), scaled(count, hidden, share))

    expert_shape = (sizes.num_moe, sizes.rank_experts, sizes.expert_width, hidden)
    return RankWeights(
        embedding=plain(sizes.vocab, hidden),
        head=plain(sizes.rank_vocab, hidden),
        last_norm=norm(hidden),
        attention=Attention(
            input_norm=norm(layers, hidden),
            query_norm=norm(layers, sizes.query_rank),
            post_norm=norm(layers, hidden),
            down=scaled(layers, sizes.query_rank + 2 * sizes.head_dim, hidden),
            up=scaled(layers, heads, sizes.query_rank),
            out=scaled(layers, hidden, heads),
        ),
        dense=feed_forward(sizes.num_dense, sizes.dense_width),
        shared=feed_forward(sizes.num_moe, sizes.shared_width),
        experts=Experts(
            router=plain(sizes.num_moe, sizes.num_experts, hidden, dtype=jnp.float32),
            gate=scaled(*expert_shape),
            up=scaled(*expert_shape),
            down=scaled(*expert_shape[:2], hidden, sizes.expert_width),
        ),
    )


def make_state(sizes: RankSizes) -> tuple[RankState, jax.Array]:
    """Sequences of `context` tokens with a random cache, and their table."""
    pages = empty_pages(sizes.num_layers * sizes.layer_pages, sizes.head_dim, sizes.storage, page_size=sizes.page_size)
    keys = jax.random.split(jax.random.key(1, impl="rbg"), 2)
    if pages.keys.dtype == jnp.float8_e4m3fn:
        pages = pages._replace(
            **{name: _random_e4m3(key, pages.keys.shape) for name, key in zip(("keys", "values"), keys, strict=True)}
        )
    lengths = jnp.full((sizes.batch,), sizes.context, jnp.int32)
    table = jnp.arange(sizes.layer_pages, dtype=jnp.int32).reshape(sizes.batch, -1)
    return RankState(jnp.arange(sizes.batch, dtype=jnp.int32), lengths, pages), table


def _random_e4m3(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Random bits with the exponent's highest bit cleared, in pieces: the words of all would need four times the memory."""

    def one(part: jax.Array) -> jax.Array:
        bits = jax.random.bits(part, shape[1:], jnp.uint8) & jnp.uint8(0b1011_1111)
        return lax.bitcast_convert_type(bits, jnp.float8_e4m3fn)

    return lax.map(one, jax.random.split(key, shape[0]))
