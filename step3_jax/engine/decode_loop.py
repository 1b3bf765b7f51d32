"""The decode loop: steps of all sequences of a call, in one program."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from step3_jax.cache.paged import Cache
from step3_jax.engine.state import (
    RUNNING,
    DecodeBatch,
    Report,
    RowState,
    StepTokens,
    begin_rows,
    draft_tokens,
    last_tokens,
    leaving_rows,
    place_tokens,
    verify_tokens,
)
from step3_jax.layers.attention import CacheStep
from step3_jax.sampling.batch import SamplingBatch
from step3_jax.sampling.speculation import Speculation

# One decoder step: (tokens [B, T], cache, their positions) -> (float32 logits [B, T, V], new cache).
Forward = Callable[[Int[Array, "B T"], Cache, CacheStep], tuple[Float[Array, "B T V"], Cache]]


class _Loop(NamedTuple):
    """What the decode loop carries, all of it updated in place.

    Attributes:
      step: Steps so far.
      cache: Pages of all layers.
      rows: The sequences.
    """

    step: Int[Array, ""]
    cache: Cache
    rows: RowState


class _Guessing(NamedTuple):
    """The same with the tokens of the next step, and whether any of them are guesses."""

    loop: _Loop
    tokens: StepTokens
    has_guess: Bool[Array, ""]


def decode_loop(
    forward: Forward,
    cache: Cache,
    batch: DecodeBatch,
    sampling: SamplingBatch,
    num_steps: Int[Array, ""],
    leave_early: Bool[Array, ""],
    *,
    vocab_size: int,
    max_steps: int,
    speculation: Speculation | None = None,
    any_row: Callable[[Bool[Array, " B"]], Bool[Array, ""]] = jnp.any,
) -> tuple[Cache, Report]:
    """Takes up to `num_steps` steps of each active row; returns early once no row is running.

    With speculation a step without any guess is the same as without speculation, and costs as much.

    Args:
      forward: One decoder step.
      cache: Pages of all layers.
      batch: The sequences.
      sampling: Parameters of the rows.
      num_steps: A traced number, at most `max_steps`, so that one program serves streaming and whole outputs.
      leave_early: Whether to return as soon as any row has ended, because others wait for its slot.
      vocab_size: V.
      max_steps: The most tokens per row that the report has room for.
      speculation: How tokens are guessed; None generates one token per step.
      any_row: Whether something holds for any row, including those on other devices, so that all devices loop equally long.
    """
    rows = begin_rows(batch, vocab_size=vocab_size, max_steps=max_steps, speculation=speculation)
    start = _Loop(jnp.zeros((), jnp.int32), cache, rows)

    def is_unfinished(loop: _Loop) -> Bool[Array, ""]:
        is_running = any_row(loop.rows.report.finish == RUNNING)
        return (loop.step < num_steps) & is_running & ~any_row(leaving_rows(loop.rows, batch, leave_early))

    def take_step(loop: _Loop, tokens: StepTokens) -> _Loop:
        logits, cache = forward(tokens.ids, loop.cache, place_tokens(loop.rows, batch, tokens))
        return _Loop(loop.step + 1, cache, verify_tokens(loop.rows, logits, tokens, batch, sampling))

    if speculation is None:
        end = jax.lax.while_loop(is_unfinished, lambda loop: take_step(loop, last_tokens(loop.rows)), start)
        return end.cache, end.rows.report

    def guess(loop: _Loop) -> _Guessing:
        with jax.named_scope("speculate"):
            tokens = draft_tokens(loop.rows, batch, sampling, speculation)
            return _Guessing(loop, tokens, any_row(tokens.num_ids > 1))

    def take_steps(now: _Guessing) -> _Guessing:
        # Loops, not a choice between two programs: a loop's buffers are its own, so nothing of the cache is copied.
        now = jax.lax.while_loop(
            lambda now: is_unfinished(now.loop) & ~now.has_guess,
            lambda now: guess(take_step(now.loop, last_tokens(now.loop.rows))),
            now,
        )
        return jax.lax.while_loop(
            lambda now: is_unfinished(now.loop) & now.has_guess,
            lambda now: guess(take_step(now.loop, now.tokens)),
            now,
        )

    last = jax.lax.while_loop(lambda now: is_unfinished(now.loop), take_steps, guess(start)).loop
    return last.cache, last.rows.report
