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
from jaxtyping import Array, Bool, Float, Int, Num

from step3_jax.config import TextConfig
from step3_jax.layers.linear import Linear
from step3_jax.layers.norm import RMSNorm
from step3_jax.layers.rope import apply_rope, rope_table


class LayerKV(NamedTuple):
    """One layer's cached keys (rotated) and values, [B, S, K] each."""

    keys: Float[Array, "B S K"]
    values: Float[Array, "B S K"]


class AttentionContext(NamedTuple):
    """What all layers of one step share.

    Attributes:
      cos, sin: Rotary table, [B, T, K/2].
      mask: Which cached tokens each query token may see, [B, T, S].
      starts: Cache row of the first query token of each sequence, [B].
    """

    cos: Float[Array, "B T half"]
    sin: Float[Array, "B T half"]
    mask: Bool[Array, "B T S"]
    starts: Int[Array, " B"]


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
        self, hidden: Float[Array, "B T D"], context: AttentionContext, kv: LayerKV | None = None
    ) -> tuple[Float[Array, "B T D"], LayerKV | None]:
        """Attends to the cache (with the new rows written into it), or to `hidden` alone when `kv` is None."""
        batch, length, _ = hidden.shape
        queries = self.wq(self.inter_norm(self.q_proj(hidden)))
        queries = apply_rope(queries.reshape(batch, length, self.num_heads, -1), context.cos, context.sin)
        keys = apply_rope(self.k_proj(hidden), context.cos, context.sin)
        values = self.v_proj(hidden)
        if kv is not None:
            kv = LayerKV(write_rows(kv.keys, keys, context.starts), write_rows(kv.values, values, context.starts))
            keys, values = kv
        heads = attend(queries, keys, values, context.mask)
        return self.o_proj(heads.reshape(batch, length, -1)), kv


def attention_context(
    config: TextConfig,
    shape: tuple[int, int],
    *,
    starts: Int[Array, " B"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    cache_length: int | None = None,
) -> AttentionContext:
    """Builds the context of a step of `shape` [B, T].

    Args:
      config: Head size and rotary base.
      shape: Sequences and query tokens.
      starts: Tokens already cached, for each sequence; zero if absent.
      positions: Rotary positions, if they are not starts + 0..T-1. The mask goes by order, not by position.
      cache_length: Cache rows S; without a cache the T tokens see each other.
    """
    batch, length = shape
    if starts is None:
        starts = jnp.zeros((batch,), jnp.int32)
    rows = starts[:, None] + jnp.arange(length, dtype=jnp.int32)
    if positions is None:
        positions = rows
    cos, sin = rope_table(positions, head_dim=config.head_dim, theta=config.rope_theta)
    mask = jnp.arange(cache_length or length) <= rows[:, :, None]
    return AttentionContext(cos, sin, mask, starts)


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


def write_rows(
    cache: Float[Array, "B S K"], rows: Float[Array, "B T K"], starts: Int[Array, " B"]
) -> Float[Array, "B S K"]:
    """Writes T new rows of each sequence at its own start; the caller sees to it that they fit."""
    rows = rows.astype(cache.dtype)
    if cache.dtype == jnp.bfloat16 and jax.default_backend() == "cpu":
        # As integers: XLA:CPU writes bfloat16 by turning the whole cache to float32 and back.
        cache_bits, row_bits = (jax.lax.bitcast_convert_type(array, jnp.uint16) for array in (cache, rows))
        return jax.lax.bitcast_convert_type(_write_rows(cache_bits, row_bits, starts), cache.dtype)
    return _write_rows(cache, rows, starts)


def _write_rows(cache: Num[Array, "B S K"], rows: Num[Array, "B T K"], starts: Int[Array, " B"]) -> Num[Array, "B S K"]:
    if cache.shape[0] == 1 and rows.shape[1] == 1 and jax.default_backend() == "cpu":
        # A scatter stays in place: XLA:CPU merges a single update into the products that read the cache, and then copies
        # the cache several times a step. Of two rows, the second outside and dropped, it makes no single update.
        places = jnp.stack([starts[0], jnp.full((), cache.shape[1], starts.dtype)])
        return cache.at[0, places].set(jnp.repeat(rows[0], 2, axis=0), mode="drop")
    if cache.shape[0] == 1:
        return jax.lax.dynamic_update_slice(cache, rows, (0, starts[0], 0))
    return jax.vmap(lambda one, new, start: jax.lax.dynamic_update_slice(one, new, (start, 0)))(cache, rows, starts)
