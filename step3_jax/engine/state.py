"""The state of a batch between decode steps, and the step's pure functions: what any executor shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from step3_jax.layers.attention import LayerKV
from step3_jax.sampling.batch import SamplingBatch, SamplingMode
from step3_jax.sampling.penalties import TokenCounts, count_prompt, count_token
from step3_jax.sampling.sampler import StepLogprobs, sample, step_logprobs

# Values of `Report.finish`. HALTED: the host has seen enough, as a stop string was found.
RUNNING, STOPPED, FULL, HALTED = range(4)

Cache = tuple[LayerKV, ...]
# One decoder step: (last tokens [B], cache, tokens cached [B]) -> (float32 logits [B, V], new cache).
Forward = Callable[
    [Int[Array, " B"], Cache, Int[Array, " B"]],
    tuple[Float[Array, "B V"], Cache],
]


class PrefillBatch(NamedTuple):
    """Prompts of a batch, right-padded to a bucket.

    Attributes:
      token_ids: Ids; whatever stands behind a row's length is padding.
      lengths: Prompt tokens, at least 1.
      features: Image features of all rows; None without pictures.
      feature_rows: Row of `features` for each token, -1 for none; None without pictures.
    """

    token_ids: Int[Array, "B T"]
    lengths: Int[Array, " B"]
    features: Float[Array, "M D"] | None = None
    feature_rows: Int[Array, "B T"] | None = None


class Report(NamedTuple):
    """What the host reads after a call. M is the cache length.

    Attributes:
      tokens: Output so far; the token that ended a row is the last of it.
      num_tokens: Valid tokens of each row.
      finish: RUNNING, STOPPED (an end token), FULL (max_tokens) or HALTED.
      logprobs: Log-probabilities of each output token, if the mode records them.
    """

    tokens: Int[Array, "B M"]
    num_tokens: Int[Array, " B"]
    finish: Int[Array, " B"]
    logprobs: StepLogprobs | None


class DecodeState(NamedTuple):
    """What the decode loop carries, all of it on the device and updated in place.

    Attributes:
      cache: One entry a layer.
      cached: Tokens of each row in the cache: all but the last.
      last: Last token of each row, not yet in the cache.
      report: Output.
      counts: Token counts, if the mode has penalties.
    """

    cache: Cache
    cached: Int[Array, " B"]
    last: Int[Array, " B"]
    report: Report
    counts: TokenCounts | None


def start_state(
    logits: Float[Array, "B V"],
    batch: PrefillBatch,
    sampling: SamplingBatch,
    *,
    length: int,
    mode: SamplingMode,
) -> DecodeState:
    """The state after prefill, the first token chosen.

    It has no cache yet: the caller puts its own in. So this small program, which depends on the mode, is compiled apart
    from prefill, which does not.

    Args:
      logits: Of each prompt's last token.
      batch: The prompts.
      sampling: Parameters of the rows; a row of `max_tokens` 0 is full from the start.
      length: Tokens that the cache has room for.
      mode: What may be left out.
    """
    batch_size, vocab_size = logits.shape
    logprobs = None
    if mode.num_logprobs:
        one, wide = (batch_size, length), (batch_size, length, mode.num_logprobs)
        logprobs = StepLogprobs(
            jnp.zeros(one, jnp.float32),
            jnp.zeros(one, jnp.int32),
            jnp.zeros(wide, jnp.int32),
            jnp.zeros(wide, jnp.float32),
        )
    report = Report(
        tokens=jnp.zeros((batch_size, length), jnp.int32),
        num_tokens=jnp.zeros((batch_size,), jnp.int32),
        finish=jnp.where(sampling.max_tokens > 0, RUNNING, FULL).astype(jnp.int32),
        logprobs=logprobs,
    )
    counts = count_prompt(batch.token_ids, batch.lengths, vocab_size) if mode.use_penalties else None
    lengths = batch.lengths.astype(jnp.int32)
    state = DecodeState((), lengths, jnp.zeros((batch_size,), jnp.int32), report, counts)
    return _choose(state, logits, sampling, mode)


def decode_loop(
    forward: Forward,
    state: DecodeState,
    sampling: SamplingBatch,
    is_halted: Bool[Array, " B"],
    num_steps: Int[Array, ""],
    *,
    mode: SamplingMode,
) -> DecodeState:
    """Makes up to `num_steps` more tokens of each row; returns early once no row is running.

    Args:
      forward: One decoder step.
      state: As the last call left it.
      sampling: Parameters of the rows.
      is_halted: Rows that the host ends.
      num_steps: A traced number, so that one program serves streaming and whole outputs.
      mode: What may be left out.
    """
    finish = jnp.where(is_halted & (state.report.finish == RUNNING), HALTED, state.report.finish)
    state = state._replace(report=state.report._replace(finish=finish))

    def is_unfinished(carry: tuple[Int[Array, ""], DecodeState]) -> Bool[Array, ""]:
        step, state = carry
        return (step < num_steps) & jnp.any(state.report.finish == RUNNING)

    def take_step(carry: tuple[Int[Array, ""], DecodeState]) -> tuple[Int[Array, ""], DecodeState]:
        step, state = carry
        logits, cache = forward(state.last, state.cache, state.cached)
        # A finished row stays where it is, and writes the same cache row again and again.
        cached = state.cached + (state.report.finish == RUNNING)
        state = _choose(state._replace(cache=cache, cached=cached), logits, sampling, mode)
        return step + 1, state

    _, state = jax.lax.while_loop(is_unfinished, take_step, (jnp.zeros((), jnp.int32), state))
    return state


def _choose(
    state: DecodeState, logits: Float[Array, "B V"], sampling: SamplingBatch, mode: SamplingMode
) -> DecodeState:
    """Chooses a token for each running row, writes it down, and ends rows."""
    report, counts = state.report, state.counts
    is_running = report.finish == RUNNING
    # `cached` tokens stand before the new one, so it is that token's position.
    with jax.named_scope("sample"):
        tokens = sample(
            logits,
            sampling,
            positions=state.cached,
            num_tokens=report.num_tokens,
            counts=counts,
            mode=mode,
        )
    tokens = jnp.where(is_running, tokens, state.last)
    rows = jnp.arange(tokens.shape[0])
    # Finished rows write behind the buffer, which drops it.
    columns = jnp.where(is_running, report.num_tokens, report.tokens.shape[1])
    logprobs = report.logprobs
    if logprobs is not None:
        new = step_logprobs(logits, tokens, mode.num_logprobs)
        logprobs = StepLogprobs(
            *(buffer.at[rows, columns].set(value, mode="drop") for buffer, value in zip(logprobs, new, strict=True))
        )
    if counts is not None:
        counts = count_token(counts, tokens, is_running)
    num_tokens = report.num_tokens + is_running
    is_end = jnp.any(tokens[:, None] == sampling.stop_ids, axis=-1)
    finish = jnp.where(is_end, STOPPED, jnp.where(num_tokens >= sampling.max_tokens, FULL, RUNNING))
    report = Report(
        tokens=report.tokens.at[rows, columns].set(tokens, mode="drop"),
        num_tokens=num_tokens,
        finish=jnp.where(is_running, finish, report.finish).astype(jnp.int32),
        logprobs=logprobs,
    )
    return state._replace(last=tokens, report=report, counts=counts)
