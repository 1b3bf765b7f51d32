"""Chooses the next token of each row from its logits.

One program serves all sampling parameters. Anything that costs more than one pass over the logits is under `jax.lax.cond`,
with "some row uses it" as its condition: a greedy batch takes the likeliest tokens and does nothing else. The conditions
depend on the rows at hand, which may differ between the devices of a mesh, so branches must not communicate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from step3_jax.sampling.batch import NUM_CANDIDATES, SamplingBatch
from step3_jax.sampling.penalties import TokenCounts, apply_bias, apply_mask, apply_penalties, has_penalties, mask_ends

# Explicit, so that a change of JAX's default generator does not change the result of a seed.
_GENERATOR = "threefry2x32"


class StepLogprobs(NamedTuple):
    """Log-probabilities of one step, of the model's own logits: before bias, penalties and temperature.

    Attributes:
      chosen: Log-probability of the chosen token.
      rank: The chosen token's rank among all, from 1.
      top_ids, top_values: The likeliest tokens.
    """

    chosen: Float[Array, " B"]
    rank: Int[Array, " B"]
    top_ids: Int[Array, "B width"]
    top_values: Float[Array, "B width"]


def sample(
    logits: Float[Array, "B V"],
    batch: SamplingBatch,
    *,
    positions: Int[Array, " B"],
    num_tokens: Int[Array, " B"],
    count_tokens: Callable[[], TokenCounts] | None = None,
    mask: Int[Array, "B words"] | None = None,
) -> Int[Array, " B"]:
    """Chooses the next token of each row.

    A row's choice depends only on its own logits and parameters and on (seed, position), never on its place in the
    batch.

    Args:
      logits: Float32 logits.
      batch: Parameters of the rows.
      positions: Position of the new token in its sequence, including the prompt.
      num_tokens: Tokens of the output so far.
      count_tokens: Counts the sequences' tokens, if some row has penalties; None if no row ever has.
      mask: Bits of the tokens that each row may get, see `DecodeBatch.mask`. For a row with a mask, the mask enforces
      `min_tokens`.
    """
    is_drawn = batch.temperature > 0
    is_masked = jnp.zeros_like(is_drawn) if mask is None else jnp.any(mask != -1, axis=-1)
    # A mask without the end tokens may be empty; whoever made it has removed them where possible.
    num_tokens = jnp.where(is_masked, jnp.iinfo(jnp.int32).max, num_tokens)
    is_processed = is_masked | _is_processed(batch, num_tokens)

    def choose() -> Int[Array, " B"]:
        processed = jax.lax.cond(
            jnp.any(is_processed),
            lambda: process_logits(logits, batch, num_tokens=num_tokens, count_tokens=count_tokens, mask=mask),
            lambda: logits,
        )
        likeliest = _argmax(processed)
        return jax.lax.cond(jnp.any(is_drawn), lambda: draw(processed, likeliest, batch, positions), lambda: likeliest)

    return jax.lax.cond(jnp.any(is_drawn | is_processed), choose, lambda: _argmax(logits))


def process_logits(
    logits: Float[Array, "B V"],
    batch: SamplingBatch,
    *,
    num_tokens: Int[Array, " B"],
    count_tokens: Callable[[], TokenCounts] | None,
    mask: Int[Array, "B words"] | None = None,
) -> Float[Array, "B V"]:
    """Everything that changes which token is likeliest: masked ends, bias, penalties, masks. Arguments as for `sample`."""
    processed = apply_bias(mask_ends(logits, num_tokens, batch), batch)
    if count_tokens is not None:
        biased = processed
        processed = jax.lax.cond(
            jnp.any(has_penalties(batch)), lambda: apply_penalties(biased, count_tokens(), batch), lambda: biased
        )
    if mask is None:
        return processed
    return jax.lax.cond(jnp.any(mask != -1), lambda: apply_mask(processed, mask), lambda: processed)


def draw(
    logits: Float[Array, "B V"], likeliest: Int[Array, " B"], batch: SamplingBatch, positions: Int[Array, " B"]
) -> Int[Array, " B"]:
    """Draws the token of each row that has a temperature; the others get their likeliest.

    Args:
      logits: After `process_logits`.
      likeliest: The likeliest token of each row.
      batch: Parameters of the rows.
      positions: As for `sample`.
    """
    is_greedy = batch.temperature == 0
    logits = logits / jnp.where(is_greedy, 1.0, batch.temperature)[:, None]
    largest = jnp.take_along_axis(logits, likeliest[:, None], axis=-1)[:, 0]
    logits = _cut_below(logits, least_by_min_p(largest, batch.min_p))
    # Greedy rows do not need the filters.
    is_filtered = ~is_greedy & _has_filter(batch, logits.shape[1])
    least = jax.lax.cond(
        jnp.any(is_filtered), lambda: _least_kept(logits, batch, is_filtered), lambda: jnp.full_like(largest, -jnp.inf)
    )
    # argmax(logits + Gumbel noise) draws from softmax(logits).
    noise = gumbel_noise(batch.seeds, positions, logits.shape[1])
    return jnp.where(is_greedy, likeliest, _argmax(_cut_below(logits, least) + noise))


def least_by_min_p(largest: Float[Array, " B"], min_p: Float[Array, " B"]) -> Float[Array, " B"]:
    """The lowest logit of a token at least `min_p` times as likely as the likeliest (arXiv 2407.01082)."""
    return largest + jnp.log(min_p)


def least_by_rank(
    logits: Float[Array, "B V"], top_k: Int[Array, " B"], top_p: Float[Array, " B"], *, num_candidates: int
) -> Float[Array, " B"]:
    """The lowest logit among the `top_k` likeliest tokens, of which only the likeliest that together reach `top_p` count.

    One sort serves both. Tokens that tie with the last kept one are kept too.

    Args:
      logits: Logits after the temperature.
      top_k: Tokens to keep; V for all.
      top_p: Probability to reach; the token that crosses it is kept.
      num_candidates: Number of likeliest tokens to consider: V, or fewer if every row with a filter has a `top_k`
        within them.

    Returns:
      -inf for a row without either filter.
    """
    vocab_size = logits.shape[1]
    if num_candidates < vocab_size:
        ordered = jax.lax.top_k(logits, num_candidates)[0]
    else:
        ordered = -jnp.sort(-logits, axis=-1)
    is_top = jnp.arange(num_candidates) < top_k[:, None]
    probabilities = jax.nn.softmax(jnp.where(is_top, ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # Rounding must not cut the tail of a row that has no top_p.
    is_kept = is_top & ((before < top_p[:, None]) | (top_p[:, None] >= 1))
    least = jnp.min(jnp.where(is_kept, ordered, jnp.inf), axis=-1)
    # A row without either filter keeps all tokens, although the candidates may end above its last token.
    return jnp.where((top_k < vocab_size) | (top_p < 1), least, -jnp.inf)


def gumbel_noise(seeds: UInt32[Array, "B 2"], positions: Int[Array, " B"], vocab_size: int) -> Float[Array, "B V"]:
    """Noise of each row's (seed, position)."""

    def draw(words: UInt32[Array, " 2"], position: Int[Array, ""]) -> Float[Array, " V"]:
        key = jax.random.fold_in(jax.random.wrap_key_data(words, impl=_GENERATOR), position)
        return jax.random.gumbel(key, (vocab_size,), jnp.float32)

    return jax.vmap(draw)(seeds, positions)


def step_logprobs(logits: Float[Array, "B V"], tokens: Int[Array, " B"], width: int) -> StepLogprobs:
    """Log-probabilities of the chosen and of the `width` likeliest tokens."""
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)
    rank = 1 + jnp.sum(logprobs > chosen, axis=-1, dtype=jnp.int32)
    top_values, top_ids = jax.lax.top_k(logprobs, width)
    return StepLogprobs(chosen[:, 0], rank, top_ids.astype(jnp.int32), top_values)


def _least_kept(
    logits: Float[Array, "B V"], batch: SamplingBatch, is_filtered: Bool[Array, " B"]
) -> Float[Array, " B"]:
    """`least_by_rank` without sorting the vocabulary, if no row needs that."""
    vocab_size, top_k, top_p = logits.shape[1], batch.top_k, batch.top_p
    if vocab_size <= NUM_CANDIDATES:
        return least_by_rank(logits, top_k, top_p, num_candidates=vocab_size)
    # top_p without top_k may need every token, so it considers all of them.
    return jax.lax.cond(
        jnp.all(~is_filtered | (top_k <= NUM_CANDIDATES)),
        lambda: least_by_rank(logits, top_k, top_p, num_candidates=NUM_CANDIDATES),
        lambda: least_by_rank(logits, top_k, top_p, num_candidates=vocab_size),
    )


def _is_processed(batch: SamplingBatch, num_tokens: Int[Array, " B"]) -> Bool[Array, " B"]:
    """Rows that `process_logits` changes."""
    has_bias = jnp.any(batch.bias_values != 0, axis=-1)
    return (num_tokens < batch.min_tokens) | has_bias | has_penalties(batch)


def _has_filter(batch: SamplingBatch, vocab_size: int) -> Bool[Array, " B"]:
    return (batch.top_k < vocab_size) | (batch.top_p < 1)


def _cut_below(logits: Float[Array, "B V"], least: Float[Array, " B"]) -> Float[Array, "B V"]:
    return jnp.where(logits < least[:, None], -jnp.inf, logits)


def _argmax(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
