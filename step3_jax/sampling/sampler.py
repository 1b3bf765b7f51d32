"""From logits to the next token of each row."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from step3_jax.sampling.batch import SamplingBatch, SamplingMode
from step3_jax.sampling.penalties import TokenCounts, apply_bias, apply_penalties, mask_ends

# Named, so that a change of JAX's default generator does not change what a seed gives.
_GENERATOR = "threefry2x32"


class StepLogprobs(NamedTuple):
    """Log-probabilities of one step, of the model's own logits: before bias, penalties and temperature.

    Attributes:
      chosen: Of the chosen token.
      rank: The chosen token's place among all, from 1.
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
    counts: TokenCounts | None,
    mode: SamplingMode,
) -> Int[Array, " B"]:
    """Chooses the next token of each row.

    A row's choice depends on its own logits and parameters and on (seed, position) alone, never on its place in the
    batch.

    Args:
      logits: Float32 logits.
      batch: Parameters of the rows.
      positions: Place of the new token in its sequence, prompt counted.
      num_tokens: Tokens of the output so far.
      counts: For penalties; None if the mode has none.
      mode: What may be left out.
    """
    logits = process_logits(logits, batch, num_tokens=num_tokens, counts=counts, mode=mode)
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if mode.is_greedy:
        return greedy
    is_greedy = batch.temperature == 0
    logits = logits / jnp.where(is_greedy, 1.0, batch.temperature)[:, None]
    if mode.use_min_p:
        logits = filter_min_p(logits, batch.min_p)
    if mode.num_candidates:
        logits = filter_top(logits, batch.top_k, batch.top_p, num_candidates=mode.num_candidates)
    # argmax(logits + Gumbel noise) draws from softmax(logits).
    drawn = jnp.argmax(logits + gumbel_noise(batch.seeds, positions, logits.shape[1]), axis=-1)
    return jnp.where(is_greedy, greedy, drawn.astype(jnp.int32))


def process_logits(
    logits: Float[Array, "B V"],
    batch: SamplingBatch,
    *,
    num_tokens: Int[Array, " B"],
    counts: TokenCounts | None,
    mode: SamplingMode,
) -> Float[Array, "B V"]:
    """All that changes which token is likeliest: ends masked, bias, penalties."""
    if mode.use_min_tokens:
        logits = mask_ends(logits, num_tokens, batch)
    if mode.use_bias:
        logits = apply_bias(logits, batch)
    if mode.use_penalties and counts is not None:
        logits = apply_penalties(logits, counts, batch)
    return logits


def filter_min_p(logits: Float[Array, "B V"], min_p: Float[Array, " B"]) -> Float[Array, "B V"]:
    """Keeps tokens whose probability is at least `min_p` times the largest (arXiv 2407.01082)."""
    lowest = jnp.max(logits, axis=-1) + jnp.log(min_p)
    return jnp.where(logits < lowest[:, None], -jnp.inf, logits)


def filter_top(
    logits: Float[Array, "B V"], top_k: Int[Array, " B"], top_p: Float[Array, " B"], *, num_candidates: int
) -> Float[Array, "B V"]:
    """Keeps the `top_k` likeliest tokens, and of these the likeliest that together reach `top_p`.

    One sort serves both: each gives a least logit, so tokens that tie with the last one kept are kept too.

    Args:
      logits: Logits after the temperature.
      top_k: Tokens to keep; V for all.
      top_p: Probability to reach; the token that crosses it is kept.
      num_candidates: Likeliest tokens to look at: V, or fewer if every row with a filter has a `top_k` within them.
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
    lowest = jnp.min(jnp.where(is_kept, ordered, jnp.inf), axis=-1)
    # A row without either filter keeps all, though the candidates may end above its last token.
    has_filter = (top_k < vocab_size) | (top_p < 1)
    return jnp.where((logits < lowest[:, None]) & has_filter[:, None], -jnp.inf, logits)


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
