"""What goes to the device and comes back, and the decode loop's pure functions: what any executor shares.

Between two calls the device keeps the KV cache and nothing else. All that is known of a sequence stands on the host, and
each call brings it along: a few numbers a row. Batches are numpy on the host; the same classes hold arrays and tracers on
the device.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from step3_jax.cache.paged import Cache
from step3_jax.layers.attention import CacheStep
from step3_jax.sampling.batch import SamplingBatch, logprob_width
from step3_jax.sampling.penalties import count_tokens
from step3_jax.sampling.sampler import StepLogprobs, sample, step_logprobs

# Values of `Report.finish`. IDLE: the row had nothing to do.
RUNNING, STOPPED, FULL, IDLE = range(4)

# One decoder step: (last tokens [B], cache, where they stand) -> (float32 logits [B, V], new cache).
Forward = Callable[[Int[Array, " B"], Cache, CacheStep], tuple[Float[Array, "B V"], Cache]]

# Tokens of a chunk that each expert got, by shard and MoE layer: int32 [shards, layers, E]. The model's last layer is left
# out, as its FFN is not needed for a cache. None where the executor does not count them.
ExpertTokens = np.ndarray | None


class PrefillBatch(NamedTuple):
    """A chunk of prompts: tokens of several sequences one behind the other, filled up to a bucket.

    Attributes:
      token_ids: Ids; what stands behind the last sequence is padding.
      query_starts: First token of each sequence, and the end of the last one: B + 1 numbers.
      lengths: Tokens of each sequence in the cache once the chunk is read; 0 for none.
      table: Pages of each sequence.
      features: Image features of the chunk; None without pictures.
      feature_rows: Row of `features` for each token, -1 for none; None without pictures.
    """

    token_ids: Int[Array, " N"]
    query_starts: Int[Array, " starts"]
    lengths: Int[Array, " B"]
    table: Int[Array, "B max_pages"]
    features: Float[Array, "M D"] | None = None
    feature_rows: Int[Array, " N"] | None = None


class DecodeBatch(NamedTuple):
    """Sequences between two decode steps.

    Attributes:
      last: Last token of each sequence, not in the cache yet.
      cached: Tokens in the cache: all before `last`.
      num_generated: Output tokens so far; 0 where `last` ends the prompt.
      is_active: Rows that have something to do. The others write to no page.
      table: Pages of each sequence, with room for all tokens it may get.
      history: Prompt and output so far, `last` included, filled up with V; not read unless some row has penalties. None if
        none ever has.
      mask: Which tokens a row may get, a bit for each, the lowest of the first word that of token 0; all bits for any. None
        if no row ever has a mask. It is that of the next token alone, so a call with one takes one step.
    """

    last: Int[Array, " B"]
    cached: Int[Array, " B"]
    num_generated: Int[Array, " B"]
    is_active: Bool[Array, " B"]
    table: Int[Array, "B max_pages"]
    history: Int[Array, "B M"] | None = None
    mask: Int[Array, "B words"] | None = None


@dataclasses.dataclass(frozen=True)
class DecodeCall:
    """What one decode call is to do.

    Attributes:
      batch: The sequences.
      sampling: Parameters of the rows.
      num_steps: Steps to take at most.
      max_steps: Tokens of a row that the report has room for; a part of the compiled program's key.
      leave_early: Whether to return as soon as a row has ended.
    """

    batch: DecodeBatch
    sampling: SamplingBatch
    num_steps: int
    max_steps: int
    leave_early: bool = False

    def cut_report(self, report: Report) -> Report:
        """A report without log-probabilities that no row asked for, so that they are not copied to the host."""
        return report if np.any(self.sampling.has_logprobs) else report._replace(logprobs=None)


class Report(NamedTuple):
    """What the host reads after a decode call. M is the most steps that a call takes.

    Attributes:
      tokens: New tokens; the one that ended a row is the last of it.
      num_new: Valid tokens of each row.
      finish: RUNNING, STOPPED (an end token, or the row's `pause_ids`), FULL (max_tokens) or IDLE.
      logprobs: Log-probabilities of each new token, zeros in a step in which no row asks for them; None once
        `DecodeCall.cut_report` has found that none does.
    """

    tokens: Int[Array, "B M"]
    num_new: Int[Array, " B"]
    finish: Int[Array, " B"]
    logprobs: StepLogprobs | None


class RowState(NamedTuple):
    """What changes of the sequences from step to step.

    Attributes:
      last: Last token of each, not in the cache yet.
      report: What was made so far.
    """

    last: Int[Array, " B"]
    report: Report


class _Loop(NamedTuple):
    """What the decode loop carries, all of it updated in place."""

    step: Int[Array, ""]
    cache: Cache
    rows: RowState


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
    any_row: Callable[[Bool[Array, " B"]], Bool[Array, ""]] = jnp.any,
) -> tuple[Cache, Report]:
    """Makes up to `num_steps` tokens of each active row; returns early once no row is running.

    Args:
      forward: One decoder step.
      cache: Pages of all layers.
      batch: The sequences.
      sampling: Parameters of the rows.
      num_steps: A traced number, at most `max_steps`, so that one program serves streaming and whole outputs.
      leave_early: Whether to return as soon as any row has ended, as others wait for its place.
      vocab_size: V.
      max_steps: Tokens of a row that the report has room for.
      any_row: Whether something holds for any row, also of those on other devices, so that all of them go on as long.
    """
    rows = begin_rows(batch, vocab_size=vocab_size, max_steps=max_steps)
    start = _Loop(jnp.zeros((), jnp.int32), cache, rows)

    def is_unfinished(loop: _Loop) -> Bool[Array, ""]:
        finish = loop.rows.report.finish
        has_ended = any_row((finish == STOPPED) | (finish == FULL))
        return (loop.step < num_steps) & any_row(finish == RUNNING) & ~(leave_early & has_ended)

    def take_step(loop: _Loop) -> _Loop:
        place = CacheStep(batch.table, step_lengths(loop.rows, batch))
        logits, cache = forward(loop.rows.last, loop.cache, place)
        return _Loop(loop.step + 1, cache, choose_tokens(loop.rows, logits, batch, sampling))

    end = jax.lax.while_loop(is_unfinished, take_step, start)
    return end.cache, end.rows.report


def begin_rows(batch: DecodeBatch, *, vocab_size: int, max_steps: int) -> RowState:
    """The state before a call's first step; arguments as for `decode_loop`."""
    batch_size = batch.last.shape[0]
    one, wide = (batch_size, max_steps), (batch_size, max_steps, logprob_width(vocab_size))
    report = Report(
        tokens=jnp.zeros(one, jnp.int32),
        num_new=jnp.zeros((batch_size,), jnp.int32),
        finish=jnp.where(batch.is_active, RUNNING, IDLE).astype(jnp.int32),
        logprobs=StepLogprobs(
            jnp.zeros(one, jnp.float32),
            jnp.zeros(one, jnp.int32),
            jnp.zeros(wide, jnp.int32),
            jnp.zeros(wide, jnp.float32),
        ),
    )
    return RowState(batch.last, report)


def step_lengths(rows: RowState, batch: DecodeBatch) -> Int[Array, " B"]:
    """Tokens of each sequence in the cache once the next step has written its own; 0 for a row that does not run."""
    # Of a running row all new tokens but the last are cached, and now the last one too.
    return jnp.where(rows.report.finish == RUNNING, batch.cached + rows.report.num_new + 1, 0)


def choose_tokens(rows: RowState, logits: Float[Array, "B V"], batch: DecodeBatch, sampling: SamplingBatch) -> RowState:
    """Chooses a token for each running row, writes it down, and ends rows."""
    report, history = rows.report, batch.history
    is_running = report.finish == RUNNING

    count = None
    if history is not None:
        count = functools.partial(
            count_tokens,
            history,
            batch.cached + 1,
            batch.num_generated,
            report.tokens,
            report.num_new,
            vocab_size=logits.shape[1],
        )

    with jax.named_scope("sample"):
        tokens = sample(
            logits,
            sampling,
            # As many tokens stand before the new one.
            positions=batch.cached + 1 + report.num_new,
            num_tokens=batch.num_generated + report.num_new,
            count_tokens=count,
            mask=batch.mask,
        )
    tokens = jnp.where(is_running, tokens, rows.last)
    places = jnp.arange(tokens.shape[0])
    # Rows that do not run write behind the buffer, which drops it.
    columns = jnp.where(is_running, report.num_new, report.tokens.shape[1])
    logprobs = report.logprobs
    if logprobs is not None:
        width = logprobs.top_ids.shape[-1]
        with jax.named_scope("sample"):
            new = jax.lax.cond(
                jnp.any(sampling.has_logprobs),
                lambda: step_logprobs(logits, tokens, width),
                lambda: jax.tree.map(lambda buffer: jnp.zeros_like(buffer[:, 0]), logprobs),
            )
        logprobs = StepLogprobs(
            *(buffer.at[places, columns].set(value, mode="drop") for buffer, value in zip(logprobs, new, strict=True))
        )
    num_new = report.num_new + is_running
    is_end = jnp.any(tokens[:, None] == sampling.stop_ids, axis=-1)
    is_full = batch.num_generated + num_new >= sampling.max_tokens
    is_pause = tokens == sampling.pause_ids
    finish = jnp.where(is_end, STOPPED, jnp.where(is_full, FULL, jnp.where(is_pause, STOPPED, RUNNING)))
    report = Report(
        tokens=report.tokens.at[places, columns].set(tokens, mode="drop"),
        num_new=num_new,
        finish=jnp.where(is_running, finish, report.finish).astype(jnp.int32),
        logprobs=logprobs,
    )
    return RowState(tokens, report)
