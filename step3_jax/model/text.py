"""The decoder. A layer is two halves that later run on different devices: attention (with its router) and FFN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from step3_jax.config import TextConfig
from step3_jax.layers.attention import MFA, AttentionContext, LayerKV, attention_context
from step3_jax.layers.embed import Embedding
from step3_jax.layers.linear import Linear
from step3_jax.layers.mlp import SwiGLU
from step3_jax.layers.moe import Experts
from step3_jax.layers.norm import RMSNorm
from step3_jax.layers.router import Router, Routing


class AttentionOutput(NamedTuple):
    """What a layer's attention half hands on.

    Attributes:
      residual: The residual stream after attention; it stays on the attention side.
      normed: Tokens for the FFN half, flattened over the batch.
      routing: Expert choice of each token; None in a dense layer.
      kv: The layer's cache with the new rows.
    """

    residual: Float[Array, "B T D"]
    normed: Float[Array, "N D"]
    routing: Routing | None
    kv: LayerKV | None


class AttentionBlock(nnx.Module):
    """Attention half of a layer: norm, MFA, residual, norm, router."""

    def __init__(self, config: TextConfig, layer: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.self_attn = MFA(config, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.router = (
            Router(
                config.hidden_size,
                config.moe_num_experts,
                top_k=config.moe_top_k,
                renormalise=config.norm_expert_weight,
                dtype=dtype,
                rngs=rngs,
            )
            if config.is_moe_layer(layer)
            else None
        )

    def __call__(
        self, hidden: Float[Array, "B T D"], context: AttentionContext, kv: LayerKV | None = None
    ) -> AttentionOutput:
        with jax.named_scope("self_attn"):
            out, kv = self.self_attn(self.input_layernorm(hidden), context, kv)
        residual = hidden + out
        normed = self.post_attention_layernorm(residual).reshape(-1, residual.shape[-1])
        if self.router is None:
            return AttentionOutput(residual, normed, None, kv)
        with jax.named_scope("router"):
            return AttentionOutput(residual, normed, self.router(normed), kv)


class FfnBlock(nnx.Module):
    """FFN half of a layer: dense SwiGLU, or routed experts plus the shared expert."""

    def __init__(self, config: TextConfig, layer: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        is_moe = config.is_moe_layer(layer)
        hidden = config.hidden_size
        self.mlp = None if is_moe else SwiGLU(hidden, config.intermediate_size, dtype=dtype, rngs=rngs)
        self.moe = (
            Experts(config.moe_num_experts, hidden, config.moe_intermediate_size, dtype=dtype, rngs=rngs)
            if is_moe
            else None
        )
        self.share_expert = SwiGLU(hidden, config.share_expert_dim, dtype=dtype, rngs=rngs) if is_moe else None

    def __call__(self, normed: Float[Array, "N D"], routing: Routing | None) -> Float[Array, "N D"]:
        """The layer's FFN output; the caller adds it to the residual stream."""
        if self.mlp is not None:
            with jax.named_scope("mlp"):
                return self.mlp(normed)
        with jax.named_scope("moe"):
            routed = self.moe(normed, routing.weights, routing.experts)
        with jax.named_scope("share_expert"):
            return routed + self.share_expert(normed)


class DecoderLayer(nnx.Module):
    """One layer: the FFN half after the attention half."""

    def __init__(self, config: TextConfig, layer: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.attention = AttentionBlock(config, layer, dtype=dtype, rngs=rngs)
        self.ffn = FfnBlock(config, layer, dtype=dtype, rngs=rngs)

    def __call__(
        self, hidden: Float[Array, "B T D"], context: AttentionContext, kv: LayerKV | None = None
    ) -> tuple[Float[Array, "B T D"], LayerKV | None]:
        out = self.attention(hidden, context, kv)
        return out.residual + self.ffn(out.normed, out.routing).reshape(out.residual.shape), out.kv


class Decoder(nnx.Module):
    """Embedding, layers, last norm and head."""

    def __init__(self, config: TextConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(
            [DecoderLayer(config, layer, dtype=dtype, rngs=rngs) for layer in range(config.num_hidden_layers)]
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        embeddings: Float[Array, "B T D"],
        *,
        cache: Sequence[LayerKV] | None = None,
        starts: Int[Array, " B"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[LayerKV, ...] | None]:
        """Runs all layers.

        Args:
          embeddings: Token embeddings, image features merged in.
          cache: One entry a layer; None runs without a cache.
          starts: Tokens already in the cache, for each sequence.
          positions: Rotary positions, if they are not starts + 0..T-1.

        Returns:
          The normed hidden states (see `logits`) and the cache with the new rows.
        """
        cache_length = cache[0].keys.shape[1] if cache is not None else None
        context = attention_context(
            self.config, embeddings.shape[:2], starts=starts, positions=positions, cache_length=cache_length
        )
        hidden, new_cache = embeddings, []
        for index, layer in enumerate(self.layers):
            with jax.named_scope(f"layers.{index}"):
                hidden, kv = layer(hidden, context, cache[index] if cache is not None else None)
            new_cache.append(kv)
        return self.norm(hidden), tuple(new_cache) if cache is not None else None

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Float32 logits of normed hidden states."""
        with jax.named_scope("lm_head"):
            return self.lm_head(hidden).astype(jnp.float32)
