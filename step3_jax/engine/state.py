"""What goes to the device and comes back, and the pure functions of a decode step, shared by all executors.

Between two calls the device keeps the KV cache, and the tokens of sequences if they are looked up there. The host knows
everything about a sequence, and passes what is new with each call: a few numbers per row. Batches are numpy on the host;
the same classes hold arrays and tracers on the device.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from step3_jax.layers.attention import CacheStep
from step3_jax.sampling.batch import SamplingBatch, logprob_width
from step3_jax.sampling.ngram import find_drafts
from step3_jax.sampling.penalties import count_tokens
from step3_jax.sampling.sampler import StepLogprobs, sample, step_logprobs
from step3_jax.sampling.speculation import Speculation

# Values of `Report.finish`. IDLE: the row had nothing to do.
RUNNING, STOPPED, FULL, IDLE = range(4)

# Tokens of a chunk that each expert got, by shard and MoE layer: int32 [shards, layers, E]. The model's last layer is left
# out, as the cache does not need its FFN. None where the executor does not count them.
ExpertTokens = np.ndarray | None


class PrefillBatch(NamedTuple):
    """A chunk of prompts: concatenated tokens of several sequences, padded to a bucket.

    Attributes:
      token_ids: Ids, with padding after the last sequence.
      query_starts: First token of each sequence, and the end of the last one: B + 1 numbers.
      lengths: Tokens of each sequence in the cache once the chunk is prefilled; 0 for none.
      table: Pages of each sequence.
      features: Image features of the chunk; None without images.
      feature_rows: Row of `features` for each token, -1 for none; None without images.
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
      is_active: Rows with work to do. The others write to no page.
      table: Pages of each sequence, with room for all tokens it may get.
      history: Prompt and output so far, including `last`; what follows them is undefined. Not read unless some row has
        penalties or the call speculates. None if none ever does, and in an engine's call, which has an update instead.
      mask: The tokens that a row may get, one bit for each, starting with the lowest bit of the first word; all bits are
        set if any may come. None if no row ever has a mask. It is for the next token only: a call with one takes one step.
      max_new: Most tokens of each row in this call, for which it has pages; 1 for a row with a mask. The call ends with the
        step in which a row reaches it. None in a call that does not speculate, where the number of steps is the limit.
    """

    last: Int[Array, " B"]
    cached: Int[Array, " B"]
    num_generated: Int[Array, " B"]
    is_active: Bool[Array, " B"]
    table: Int[Array, "B max_pages"]
    history: Int[Array, "B M"] | None = None
    mask: Int[Array, "B words"] | None = None
    max_new: Int[Array, " B"] | None = None


class HistoryUpdate(NamedTuple):
    """What a decode call writes to the history that the devices keep, before its first step.

    Attributes:
      owner: Number of the packer that it comes from.
      num_slots: B.
      num_tokens: M, the tokens that each slot has room for.
      continues: Whether something that was written before is still needed.
      places: Where the tokens of each write go: slot * M + position, and B * M for padding.
      tokens: What is written there.
    """

    owner: int
    num_slots: int
    num_tokens: int
    continues: bool
    places: Int[np.ndarray, "writes N"]
    tokens: Int[np.ndarray, "writes N"]

    @property
    def num_bytes(self) -> int:
        """Bytes that are sent to the devices."""
        return self.places.nbytes + self.tokens.nbytes


@dataclasses.dataclass(frozen=True)
class DecodeCall:
    """The arguments of one decode call.

    Attributes:
      batch: The sequences.
      sampling: Parameters of the rows.
      num_steps: Steps to take at most.
      max_steps: The most tokens per row that the report has room for; part of the compiled program's key.
      leave_early: Whether to return as soon as a row has ended.
      speculation: How tokens are guessed; part of the compiled program's key. None: each step generates one token.
      history: The update of the history that the executor keeps; None if the batch has the complete history.
    """

    batch: DecodeBatch
    sampling: SamplingBatch
    num_steps: int
    max_steps: int
    leave_early: bool = False
    speculation: Speculation | None = None
    history: HistoryUpdate | None = None

    def cut_report(self, report: Report) -> Report:
        """A report without log-probabilities if no row asked for them, so that they are not copied to the host."""
        return report if np.any(self.sampling.has_logprobs) else report._replace(logprobs=None)


class DraftCounts(NamedTuple):
    """What became of guessed tokens in a decode call.

    Attributes:
      steps: Steps of each row.
      drafted: How often a row's step had a guess at each position after its last token.
      accepted: How often the guess was the token that was chosen.
    """

    steps: Int[Array, " B"]
    drafted: Int[Array, "B guesses"]
    accepted: Int[Array, "B guesses"]


class Report(NamedTuple):
    """What the host reads after a decode call. M is the most tokens that a row can get from it.

    Attributes:
      tokens: New tokens, ending with the one that ended the row.
      num_new: Valid tokens of each row.
      finish: RUNNING, STOPPED (an end token, or the row's `pause_ids`), FULL (max_tokens) or IDLE.
      logprobs: Log-probabilities of each new token, zeros in a step in which no row asks for them; None once
        `DecodeCall.cut_report` has found that no row does.
      drafts: Counts of guessed tokens; None in a call that does not speculate.
    """

    tokens: Int[Array, "B M"]
    num_new: Int[Array, " B"]
    finish: Int[Array, " B"]
    logprobs: StepLogprobs | None
    drafts: DraftCounts | None = None

    @property
    def num_steps(self) -> int:
        """Steps that the call took; for a report on the host."""
        return int((self.num_new if self.drafts is None else self.drafts.steps).max(initial=0))


class RowState(NamedTuple):
    """The part of the sequences' state that changes from step to step.

    Attributes:
      last: Last token of each, not in the cache yet.
      report: The report so far.
      history: Prompt and output so far, where guesses are looked up; None without speculation.
    """

    last: Int[Array, " B"]
    report: Report
    history: Int[Array, "B M"] | None = None


class StepTokens(NamedTuple):
    """The tokens that one step computes for each sequence.

    Attributes:
      ids: Padding, any tokens, then its last token and the guesses after it.
      num_ids: The number of tokens after the padding; 1 without guesses.
    """

    ids: Int[Array, "B T"]
    num_ids: Int[Array, " B"]


class _Verified(NamedTuple):
    """What the verification of guesses carries: the next column of logits, the rows that still get a token, all rows."""

    place: Int[Array, ""]
    is_open: Bool[Array, " B"]
    rows: RowState


def begin_rows(
    batch: DecodeBatch, *, vocab_size: int, max_steps: int, speculation: Speculation | None = None
) -> RowState:
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
    if speculation is None:
        return RowState(batch.last, report)
    none = jnp.zeros((batch_size, speculation.num_speculative_tokens), jnp.int32)
    counts = DraftCounts(jnp.zeros((batch_size,), jnp.int32), none, none)
    return RowState(batch.last, report._replace(drafts=counts), batch.history)


def running_rows(rows: RowState, batch: DecodeBatch) -> Bool[Array, " B"]:
    """Rows that take part in the next step: they run, and may get more tokens of this call."""
    is_running = rows.report.finish == RUNNING
    return is_running if batch.max_new is None else is_running & (rows.report.num_new < batch.max_new)


def leaving_rows(rows: RowState, batch: DecodeBatch, leave_early: Bool[Array, ""] | bool) -> Bool[Array, " B"]:
    """Rows with which a call ends.

    Args:
      rows: After a step.
      batch: A row that has reached its `max_new` tokens is one of them.
      leave_early: Whether a row that has ended is one too, because others wait for its slot.
    """
    finish = rows.report.finish
    has_ended = leave_early & ((finish == STOPPED) | (finish == FULL))
    return has_ended if batch.max_new is None else has_ended | ((finish == RUNNING) & ~running_rows(rows, batch))


def next_tokens(
    rows: RowState, batch: DecodeBatch, sampling: SamplingBatch, speculation: Speculation | None
) -> StepTokens:
    """The tokens of a step, equally many for every row and step: its last one, and guesses if there is speculation."""
    return last_tokens(rows) if speculation is None else draft_tokens(rows, batch, sampling, speculation)


def last_tokens(rows: RowState) -> StepTokens:
    """The tokens of a step without guesses."""
    return StepTokens(rows.last[:, None], jnp.ones_like(rows.last))


def draft_tokens(rows: RowState, batch: DecodeBatch, sampling: SamplingBatch, speculation: Speculation) -> StepTokens:
    """The tokens of a step with guesses, at most as many as a row may get.

    Args:
      rows: As `begin_rows` made them for this speculation.
      batch: The sequences, with `max_new`.
      sampling: Parameters of the rows.
      speculation: How tokens are guessed.

    Raises:
      ValueError: If the batch has no `history` or no `max_new`.
    """
    if rows.history is None or batch.max_new is None:
        raise ValueError("a call that speculates needs the tokens of its sequences and how many they may get")
    num_new = rows.report.num_new
    drafts, is_found = find_drafts(rows.history, batch.cached + 1 + num_new, speculation)
    room = jnp.minimum(batch.max_new, sampling.max_tokens - batch.num_generated) - num_new
    num_ids = jnp.where(is_found & running_rows(rows, batch), jnp.clip(room, 1, speculation.width), 1)
    # Padding comes first, so that everything that a step reads belongs to the sequence.
    order = jnp.arange(speculation.width) + num_ids[:, None] - speculation.width
    every = jnp.concatenate([rows.last[:, None], drafts], axis=1)
    return StepTokens(jnp.take_along_axis(every, jnp.maximum(order, 0), axis=1), num_ids.astype(jnp.int32))


def place_tokens(rows: RowState, batch: DecodeBatch, tokens: StepTokens) -> CacheStep:
    """The cache positions of a step's tokens."""
    if tokens.ids.shape[1] == 1:
        return CacheStep(batch.table, step_lengths(rows, batch))
    return CacheStep(batch.table, step_lengths(rows, batch, tokens.num_ids), num_new=tokens.num_ids)


def step_lengths(rows: RowState, batch: DecodeBatch, num_ids: Int[Array, " B"] | int = 1) -> Int[Array, " B"]:
    """Tokens of each sequence in the cache once the next step has written its own; 0 for a row that does not run."""
    # A running row has all new tokens but the last in the cache; the step adds the last one and the guesses.
    return jnp.where(running_rows(rows, batch), batch.cached + rows.report.num_new + num_ids, 0)


def verify_tokens(
    rows: RowState, logits: Float[Array, "B T V"], tokens: StepTokens, batch: DecodeBatch, sampling: SamplingBatch
) -> RowState:
    """Takes a step's logits: a token for each running row, and more as long as its guesses are the chosen tokens.

    Each token is chosen as without guesses, from the logits after the tokens before it. So guesses change how many
    tokens a step generates, but never which.
    """
    width = tokens.ids.shape[1]
    if width == 1:
        return _count_step(rows, choose_tokens(rows, logits[:, 0], batch, sampling), batch, tokens)

    every = jnp.arange(tokens.num_ids.shape[0])

    def column(place: Int[Array, ""]) -> Int[Array, " B"]:
        """The column of each row's token at `place` after its padding; of its last token if it has fewer."""
        return jnp.minimum(width - tokens.num_ids + place, width - 1)

    def choose(now: _Verified) -> _Verified:
        chosen = choose_tokens(now.rows, logits[every, column(now.place)], batch, sampling, is_open=now.is_open)
        place = now.place + 1
        guessed = tokens.ids[every, column(place)]
        is_right = (place < tokens.num_ids) & (guessed == chosen.last)
        return _Verified(place, now.is_open & is_right & (chosen.report.finish == RUNNING), chosen)

    start = _Verified(jnp.zeros((), jnp.int32), running_rows(rows, batch), rows)
    # As many iterations as the row with the most right guesses needs; devices do not communicate in them.
    end = jax.lax.while_loop(lambda now: (now.place < width) & jnp.any(now.is_open), choose, start)
    return _count_step(rows, end.rows, batch, tokens)


def choose_tokens(
    rows: RowState,
    logits: Float[Array, "B V"],
    batch: DecodeBatch,
    sampling: SamplingBatch,
    *,
    is_open: Bool[Array, " B"] | None = None,
) -> RowState:
    """Chooses a token for each running row, or only for the open ones; records it, and ends rows."""
    report, history = rows.report, batch.history
    is_running = running_rows(rows, batch)
    if is_open is not None:
        is_running &= is_open

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

    # The number of tokens before the new one.
    positions = batch.cached + 1 + report.num_new
    with jax.named_scope("sample"):
        tokens = sample(
            logits,
            sampling,
            positions=positions,
            num_tokens=batch.num_generated + report.num_new,
            count_tokens=count,
            mask=batch.mask,
        )
    tokens = jnp.where(is_running, tokens, rows.last)
    places = jnp.arange(tokens.shape[0])
    # Rows that do not run write past the end of the buffer, where writes are dropped.
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
    report = report._replace(
        tokens=report.tokens.at[places, columns].set(tokens, mode="drop"),
        num_new=num_new,
        finish=jnp.where(is_running, finish, report.finish).astype(jnp.int32),
        logprobs=logprobs,
    )
    written = rows.history
    if written is not None:
        written = written.at[places, jnp.where(is_running, positions, written.shape[1])].set(tokens, mode="drop")
    return RowState(tokens, report, written)


def _count_step(before: RowState, after: RowState, batch: DecodeBatch, tokens: StepTokens) -> RowState:
    """Counts what became of a step's guesses, where they are counted."""
    counts = before.report.drafts
    if counts is None:
        return after
    places = jnp.arange(counts.drafted.shape[1])
    num_accepted = after.report.num_new - before.report.num_new - 1
    counts = DraftCounts(
        counts.steps + running_rows(before, batch),
        counts.drafted + (places < tokens.num_ids[:, None] - 1),
        counts.accepted + (places < num_accepted[:, None]),
    )
    return after._replace(report=after.report._replace(drafts=counts))
