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


def count_history(
    token_ids: Int[Array, "B M"], lengths: Int[Array, " B"], num_output: Int[Array, " B"], vocab_size: int
) -> TokenCounts:
    """Counts of sequences so far.

    Args:
      token_ids: Prompt and output of each row; what stands at or behind its length is padding.
      lengths: Tokens of each row.
      num_output: How many of them, the last ones, are output.
      vocab_size: V.
    """
    batch, width = token_ids.shape
    rows = jnp.arange(batch)[:, None]
    places, ends = jnp.arange(width), lengths[:, None]
    is_output = (places >= ends - num_output[:, None]) & (places < ends)
    # An id of V is outside the vocabulary and dropped.
    prompt_ids = jnp.where((places < ends) & ~is_output, token_ids, vocab_size)
    output_ids = jnp.where(is_output, token_ids, vocab_size)
    return TokenCounts(
        in_prompt=jnp.zeros((batch, vocab_size), bool).at[rows, prompt_ids].set(True, mode="drop"),
        in_output=jnp.zeros((batch, vocab_size), jnp.int32).at[rows, output_ids].add(1, mode="drop"),
    )


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
