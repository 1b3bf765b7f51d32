"""The decoder. A layer is two halves, which may run on different devices: attention (with its router) and FFN."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pallas_kernels.pages import KVPages
from pallas_kernels.storage import PAGE_SIZE
from step3_jax.config import TextConfig
from step3_jax.layers.attention import MFA, AttentionContext, CacheStep, attention_context, with_plan
from step3_jax.layers.embed import Embedding
from step3_jax.layers.linear import Linear
from step3_jax.layers.mlp import SwiGLU
from step3_jax.layers.moe import Experts
from step3_jax.layers.norm import RMSNorm
from step3_jax.layers.router import Router, Routing
from step3_jax.layers.rows import Rows, as_plain
from step3_jax.model.layers import LayerStack, layer_modules, over_layers

T = TypeVar("T")


class AttentionOutput(NamedTuple):
    """The output of a layer's attention half.

    Attributes:
      residual: The residual stream after attention; it stays on the attention side.
      normed: Tokens for the FFN half, flattened over the batch; quantised rows if its products take them.
      routing: Expert choice of each token; None in a dense layer.
      pages: The pool with the layer's new rows.
    """

    residual: Float[Array, "B T D"]
    normed: Float[Array, "N D"] | Rows
    routing: Routing | None
    pages: KVPages | None


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
        self, hidden: Float[Array, "B T D"], context: AttentionContext, pages: KVPages | None = None
    ) -> AttentionOutput:
        with jax.named_scope("self_attn"):
            out, pages = self.self_attn(self.input_layernorm(hidden), context, pages)
        residual = hidden + out
        normed = self.post_attention_layernorm(residual.reshape(-1, residual.shape[-1]))
        if self.router is None:
            return AttentionOutput(residual, normed, None, pages)
        with jax.named_scope("router"):
            return AttentionOutput(residual, normed, self.router(as_plain(normed)), pages)


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

    def __call__(self, normed: Float[Array, "N D"] | Rows, routing: Routing | None) -> Float[Array, "N D"]:
        """The layer's FFN output; the caller adds it to the residual stream."""
        if self.mlp is not None:
            with jax.named_scope("mlp"):
                return self.mlp(normed)
        if self.moe.cpu_kernels is not None and self.share_expert.cpu_kernels == self.moe.cpu_kernels:
            with jax.named_scope("moe"):
                return self.moe(normed, routing.weights, routing.experts, shared=self.share_expert.stored)
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
        self,
        hidden: Float[Array, "B T D"],
        context: AttentionContext,
        pages: KVPages | None = None,
    ) -> tuple[Float[Array, "B T D"], KVPages | None, Routing | None]:
        """The residual stream after the layer, the pool with its rows, and the choice of experts if it has any."""
        out = self.attention(hidden, context, pages)
        added = self.ffn(out.normed, out.routing).reshape(out.residual.shape)
        return out.residual + added, out.pages, out.routing


class Decoder(nnx.Module):
    """Embedding, layers, last norm and head.

    Attributes:
      layers: `DecoderLayer`s, or stacks of them; see `model.layers`.
    """

    def __init__(self, config: TextConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.layers: nnx.List[DecoderLayer | LayerStack[DecoderLayer]] = nnx.List(
            [DecoderLayer(config, layer, dtype=dtype, rngs=rngs) for layer in range(config.num_hidden_layers)]
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, dtype=dtype, rngs=rngs)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of activations: norms have it, whatever form other weights are in."""
        return self.norm.weight.get_value().dtype

    def embed(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Token embeddings in the dtype of activations."""
        return self.embed_tokens(ids).astype(self.dtype)

    def __call__(
        self,
        embeddings: Float[Array, "B T D"],
        *,
        cache: KVPages | None = None,
        step: CacheStep | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KVPages | None]:
        """Runs all layers; see `run`.

        Returns:
          The normed hidden states (see `logits`) and the cache with the new rows.
        """
        hidden, cache, _ = self.run(embeddings, cache=cache, step=step, positions=positions)
        return hidden, cache

    def run(
        self,
        embeddings: Float[Array, "B T D"],
        *,
        cache: KVPages | None = None,
        step: CacheStep | None = None,
        positions: Int[Array, "B T"] | None = None,
        observe: Callable[[Routing], T] | None = None,
    ) -> tuple[Float[Array, "B T D"], KVPages | None, list[T]]:
        """Runs all layers.

        Args:
          embeddings: Token embeddings with image features merged in; [1, N, D] for a packed chunk of prompts.
          cache: The pool of all layers, see `cache.paged`; None runs without a cache.
          step: The tokens' positions in the cache; given if and only if there is one.
          positions: Rotary positions, if they differ from the tokens' places in their sequences.
          observe: Applied to the routing of each MoE layer; returns a pytree of arrays.

        Returns:
          The normed hidden states (see `logits`), the cache with the new rows, and the results of `observe`, see
          `over_layers`.

        Raises:
          ValueError: If only one of `cache` and `step` is given.
        """
        if (cache is None) != (step is None):
            raise ValueError("a cache needs a step, which has its tokens' positions, and a step needs a cache")
        page_size = PAGE_SIZE if cache is None else cache.page_size
        context = attention_context(
            self.config, embeddings.shape[:2], step=step, page_size=page_size, positions=positions
        )
        num_heads = layer_modules(self.layers)[0].attention.self_attn.num_heads
        context = with_plan(context, cache, embeddings.shape[1], num_heads)
        hidden, cache, observed = over_layers(self.layers, embeddings, context, cache, observe)
        return as_plain(self.norm(hidden)), cache, observed

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Float32 logits of normed hidden states."""
        with jax.named_scope("lm_head"):
            return self.lm_head(hidden).astype(jnp.float32)
