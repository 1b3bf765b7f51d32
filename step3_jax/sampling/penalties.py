"""What is done to the logits before a token is chosen, in vLLM's order: ends masked, bias, penalties."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from step3_jax.sampling.batch import SamplingBatch


class TokenCounts(NamedTuple):
    """Which tokens the prompt has, and how often the output has each."""

    in_prompt: Bool[Array, "B V"]
    in_output: Int[Array, "B V"]


def count_prompt(token_ids: Int[Array, "B T"], lengths: Int[Array, " B"], vocab_size: int) -> TokenCounts:
    """Counts at the begin of the output; tokens at or behind a row's length are padding."""
    batch, length = token_ids.shape
    ids = jnp.where(jnp.arange(length) < lengths[:, None], token_ids, vocab_size)
    mask = jnp.zeros((batch, vocab_size), bool).at[jnp.arange(batch)[:, None], ids].set(True, mode="drop")
    return TokenCounts(mask, jnp.zeros((batch, vocab_size), jnp.int32))


def count_token(counts: TokenCounts, tokens: Int[Array, " B"], is_running: Bool[Array, " B"]) -> TokenCounts:
    """Counts one more token of each row that is still running."""
    rows = jnp.arange(tokens.shape[0])
    return counts._replace(in_output=counts.in_output.at[rows, tokens].add(is_running.astype(jnp.int32)))


def apply_penalties(logits: Float[Array, "B V"], counts: TokenCounts, batch: SamplingBatch) -> Float[Array, "B V"]:
    """Repetition (CTRL, arXiv 1909.05858), then frequency and presence as in OpenAI's API.

    Repetition looks at prompt and output, the other two at the output alone.
    """
    is_seen = counts.in_prompt | (counts.in_output > 0)
    factor = jnp.where(is_seen, batch.repetition_penalty[:, None], 1.0)
    logits = jnp.where(logits > 0, logits / factor, logits * factor)
    logits = logits - batch.frequency_penalty[:, None] * counts.in_output
    return logits - batch.presence_penalty[:, None] * (counts.in_output > 0)


def apply_bias(logits: Float[Array, "B V"], batch: SamplingBatch) -> Float[Array, "B V"]:
    """Adds each row's logit bias."""
    rows = jnp.arange(logits.shape[0])[:, None]
    return logits.at[rows, batch.bias_ids].add(batch.bias_values, mode="drop")


def mask_ends(logits: Float[Array, "B V"], num_tokens: Int[Array, " B"], batch: SamplingBatch) -> Float[Array, "B V"]:
    """Forbids the tokens that would end a row before its `min_tokens`."""
    rows = jnp.arange(logits.shape[0])[:, None]
    is_early = (num_tokens < batch.min_tokens)[:, None]
    ids = jnp.where(is_early, batch.stop_ids, logits.shape[1])
    return logits.at[rows, ids].set(-jnp.inf, mode="drop")
