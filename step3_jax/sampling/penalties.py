"""Processing of the logits before a token is chosen: masked ends, bias and penalties in vLLM's order, then masks."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from step3_jax.sampling.batch import SamplingBatch

# Tokens of each row that are counted at a time.
_BLOCK_TOKENS = 1024


class TokenCounts(NamedTuple):
    """Which tokens occur in the prompt, and how often each occurs in the output."""

    in_prompt: Bool[Array, "B V"]
    in_output: Int[Array, "B V"]


def has_penalties(batch: SamplingBatch) -> Bool[Array, " B"]:
    """Rows whose tokens are counted."""
    return (batch.repetition_penalty != 1) | (batch.presence_penalty != 0) | (batch.frequency_penalty != 0)


def count_tokens(
    history: Int[Array, "B M"],
    lengths: Int[Array, " B"],
    num_output: Int[Array, " B"],
    new: Int[Array, "B steps"],
    num_new: Int[Array, " B"],
    *,
    vocab_size: int,
) -> TokenCounts:
    """Counts of the sequences so far. Its cost grows with the longest sequence, not with M.

    Args:
      history: Prompt and output of each row; entries from its length on are padding.
      lengths: Tokens of each row.
      num_output: How many of them, the last ones, are output.
      new: Output after those.
      num_new: Number of its tokens.
      vocab_size: V.
    """
    batch, width = history.shape
    rows = jnp.arange(batch)[:, None]
    block = min(width, _BLOCK_TOKENS)

    def count_block(index: Int[Array, ""], counts: TokenCounts) -> TokenCounts:
        # The last block is moved back to end with the last column; repeated entries are left out.
        first = jnp.minimum(index * block, width - block)
        ids = jax.lax.dynamic_slice_in_dim(history, first, block, axis=1)
        places = first + jnp.arange(block)
        is_own = (places >= index * block) & (places < lengths[:, None])
        is_output = is_own & (places >= (lengths - num_output)[:, None])
        # An id of V is outside the vocabulary and dropped.
        prompt_ids = jnp.where(is_own & ~is_output, ids, vocab_size)
        return TokenCounts(
            counts.in_prompt.at[rows, prompt_ids].set(True, mode="drop"),
            counts.in_output.at[rows, jnp.where(is_output, ids, vocab_size)].add(1, mode="drop"),
        )

    empty = TokenCounts(jnp.zeros((batch, vocab_size), bool), jnp.zeros((batch, vocab_size), jnp.int32))
    num_blocks = jnp.minimum(-(-jnp.max(lengths, initial=0) // block), -(-width // block))
    counts = jax.lax.fori_loop(0, num_blocks, count_block, empty)
    new_ids = jnp.where(jnp.arange(new.shape[1]) < num_new[:, None], new, vocab_size)
    return counts._replace(in_output=counts.in_output.at[rows, new_ids].add(1, mode="drop"))


def apply_penalties(logits: Float[Array, "B V"], counts: TokenCounts, batch: SamplingBatch) -> Float[Array, "B V"]:
    """Repetition (CTRL, arXiv 1909.05858), then frequency and presence as in OpenAI's API.

    Repetition considers prompt and output, the other two only the output.
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


def apply_mask(logits: Float[Array, "B V"], mask: Int[Array, "B words"]) -> Float[Array, "B V"]:
    """Forbids the tokens whose bits are not set; a word covers 32 tokens, the lowest bit the first."""
    bits = mask[:, :, None] >> jnp.arange(32, dtype=mask.dtype) & 1
    is_allowed = bits.reshape(mask.shape[0], -1)[:, : logits.shape[1]] != 0
    return jnp.where(is_allowed, logits, -jnp.inf)
