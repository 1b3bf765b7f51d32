"""Packs sequences into the arrays of a call: numpy, which executors place on their devices."""

from __future__ import annotations

import collections
from collections.abc import Sequence as Seq

import numpy as np
from jaxtyping import Float, Int

from pallas_kernels.storage import PAGE_SIZE
from step3_jax.engine.bucket_table import BucketTable
from step3_jax.engine.history import HistoryPacker
from step3_jax.engine.scheduler import Chunk, Scheduler
from step3_jax.engine.sequence import Sequence, feature_rows
from step3_jax.engine.state import DecodeBatch, DecodeCall, HistoryUpdate, PrefillBatch
from step3_jax.sampling.batch import SamplingBatch, SamplingRow, sampling_batch
from step3_jax.sampling.params import SamplingParams
from step3_jax.sampling.speculation import Speculation

# The contents of a free slot.
_IDLE = SamplingRow(SamplingParams(temperature=0.0), 0, (0, 0), ())


class Packer:
    """Makes the arrays of an engine's calls; what depends only on slot assignment is cached until it changes."""

    def __init__(self, buckets: BucketTable, vocab_size: int, speculation: Speculation | None = None) -> None:
        """Takes the sizes of the arrays, V, and how tokens are guessed."""
        self._buckets = buckets
        self._vocab_size = vocab_size
        self._speculation = speculation
        self._slots: tuple[int, SamplingBatch] | None = None
        self._table: tuple[int, Int[np.ndarray, "B max_pages"]] | None = None
        self._history = HistoryPacker(buckets.max_pages * PAGE_SIZE, buckets.max_steps)
        self._all_allowed: Int[np.ndarray, "B words"] | None = None

    def chunk(self, chunks: Seq[Chunk], shards: Seq[int]) -> PrefillBatch:
        """The arrays of some chunks, each of a sequence in one of `shards`."""
        return pack_chunk(chunks, self._buckets, shards)

    def idle_chunk(self, length: int, features: Float[np.ndarray, "_ D"] | None) -> PrefillBatch:
        """A chunk of `length` tokens per shard, all of them padding; `features` may be any, or None without images."""
        buckets = self._buckets
        num_tokens, num_seqs = length * buckets.num_shards, buckets.max_num_seqs * buckets.num_shards
        starts = np.zeros((num_seqs + buckets.num_shards,), np.int32)
        table = np.zeros((num_seqs, buckets.max_pages), np.int32)
        batch = PrefillBatch(np.zeros((num_tokens,), np.int32), starts, np.zeros((num_seqs,), np.int32), table)
        if features is None:
            return batch
        rows = np.full((num_tokens,), -1, np.int32)
        return batch._replace(features=_fill_up([features[:0]], num_tokens), feature_rows=rows)

    def decode(
        self,
        scheduler: Scheduler,
        num_steps: int,
        masks: Int[np.ndarray, "B words"] | None = None,
        *,
        max_new: int | None = None,
    ) -> DecodeCall:
        """The decode call of the sequences in slots.

        Args:
          scheduler: Has the slots.
          num_steps: Most steps.
          masks: See `Constrainer`.
          max_new: The most tokens per sequence, where tokens are guessed; `num_steps` if absent.
        """
        if self._slots is None or self._slots[0] != scheduler.version:
            self._slots = scheduler.version, pack_sampling(scheduler.slots, self._vocab_size)
        if self._table is None or self._table[0] != scheduler.table_version:
            self._table = scheduler.table_version, pack_table(scheduler.slots, self._buckets.max_pages)
        batch = pack_decode(scheduler.slots, self._table[1])._replace(
            mask=self._no_masks(scheduler.slots) if masks is None else masks
        )
        history = self._history.pack([one if self._needs_history(one) else None for one in scheduler.slots])
        # What may follow a pause is only known once the tokens before it have been looked at.
        has_pause = any(one is not None and one.is_ready and one.sampling.pause_id >= 0 for one in scheduler.slots)
        leave_early = scheduler.num_waiting > 0 or has_pause
        most = num_steps if max_new is None else max_new
        return self._call(scheduler.slots, batch, self._slots[1], history, num_steps, most, leave_early=leave_early)

    def idle_decode(self, num_seqs: int) -> DecodeCall:
        """A decode call for `num_seqs` sequences per shard, all slots empty."""
        slots = [None] * (num_seqs * self._buckets.num_shards)
        batch = pack_decode(slots, pack_table(slots, self._buckets.max_pages))
        batch = batch._replace(mask=self._no_masks(slots))
        # An empty write, so that its program is compiled too; afterwards the devices keep a history of this size.
        self._history.forget()
        history = self._history.pack_nothing(len(slots), num_writes=1)
        return self._call(slots, batch, pack_sampling(slots, self._vocab_size), history, 1, 1)

    def forget(self) -> None:
        """To be called when a call has failed: what the devices keep is unknown."""
        self._history.forget()

    def _call(
        self,
        slots: Seq[Sequence | None],
        batch: DecodeBatch,
        sampling: SamplingBatch,
        history: HistoryUpdate,
        num_steps: int,
        max_new: int,
        *,
        leave_early: bool = False,
    ) -> DecodeCall:
        if self._speculation is not None:
            # A mask is for one token.
            most = [1 if one is not None and one.is_masked else max_new for one in slots]
            batch = batch._replace(max_new=np.array(most, np.int32))
        return DecodeCall(batch, sampling, num_steps, self._buckets.max_steps, leave_early, self._speculation, history)

    def _no_masks(self, slots: Seq[Sequence | None]) -> Int[np.ndarray, "B words"]:
        """Masks that allow everything, the same array each time."""
        if self._all_allowed is None or len(self._all_allowed) != len(slots):
            self._all_allowed = np.full((len(slots), -(-self._vocab_size // 32)), -1, np.int32)
        return self._all_allowed

    def _needs_history(self, sequence: Sequence | None) -> bool:
        """Whether a sequence's tokens are looked at: those of all where tokens are guessed, else of those with penalties."""
        if sequence is None or not sequence.is_ready:
            return False
        return self._speculation is not None or sequence.sampling.params.has_penalties


def pack_chunk(chunks: Seq[Chunk], buckets: BucketTable, shards: Seq[int] | None = None) -> PrefillBatch:
    """One array of all tokens, as long as its bucket; the number of sequences and the table width are always the maximum.

    With a sharded cache, each array is the concatenation of the shards' arrays, all in the bucket of the longest one.

    Args:
      chunks: What to prefill. Groups with image places in a chunk have their features.
      buckets: The sizes of chunks.
      shards: Shard of each chunk; 0 if absent.
    """
    own_shards = [0] * len(chunks) if shards is None else shards
    num_shards, max_num_seqs = buckets.num_shards, buckets.max_num_seqs
    rows_of = [feature_rows(one.sequence.group, one.start, one.start + one.num_tokens) for one in chunks]
    has_images = any(np.any(own_rows >= 0) for own_rows in rows_of)
    totals = np.zeros((num_shards,), np.int32)
    for shard, chunk in zip(own_shards, chunks, strict=True):
        totals[shard] += chunk.num_tokens
    length = buckets.fit_chunk(int(totals.max()), has_images=has_images)
    token_ids = np.zeros((num_shards, length), np.int32)
    starts = np.repeat(totals[:, None], max_num_seqs + 1, axis=1)
    lengths = np.zeros((num_shards, max_num_seqs), np.int32)
    table = np.zeros((num_shards, max_num_seqs, buckets.max_pages), np.int32)
    rows = np.full((num_shards, length), -1, np.int32)
    features: list[Float[np.ndarray, "places D"]] = []
    filled: collections.Counter[int] = collections.Counter()
    places: collections.Counter[int] = collections.Counter()
    for shard, chunk, own_rows in zip(own_shards, chunks, rows_of, strict=True):
        sequence, end = chunk.sequence, chunk.start + chunk.num_tokens
        place, first = places[shard], filled[shard]
        starts[shard, place] = first
        token_ids[shard, first : first + chunk.num_tokens] = sequence.token_ids[chunk.start : end]
        lengths[shard, place] = end
        table[shard, place, : len(sequence.pages)] = sequence.pages
        used = own_rows[own_rows >= 0]
        if used.size and sequence.group.features is not None:
            shift = sum(map(len, features)) - int(used[0])
            rows[shard, first : first + chunk.num_tokens] = np.where(own_rows >= 0, own_rows + shift, -1)
            features.append(sequence.group.features[used[0] : used[-1] + 1])
        places[shard] += 1
        filled[shard] += chunk.num_tokens
    return PrefillBatch(
        token_ids.reshape(-1),
        starts.reshape(-1),
        lengths.reshape(-1),
        table.reshape(-1, buckets.max_pages),
        # A place has one row of features, so there are never more rows than tokens.
        _fill_up(features, rows.size) if features else None,
        rows.reshape(-1) if features else None,
    )


def pack_table(slots: Seq[Sequence | None], max_pages: int) -> Int[np.ndarray, "B max_pages"]:
    """Pages of the sequences in slots."""
    table = np.zeros((len(slots), max_pages), np.int32)
    for slot, sequence in enumerate(slots):
        if sequence is not None:
            table[slot, : len(sequence.pages)] = sequence.pages
    return table


def pack_sampling(slots: Seq[Sequence | None], vocab_size: int) -> SamplingBatch:
    """Parameters of the sequences in slots."""
    rows = [_IDLE if sequence is None else sequence.sampling for sequence in slots]
    return sampling_batch(rows, vocab_size, len(slots))


def pack_decode(slots: Seq[Sequence | None], table: Int[np.ndarray, "B max_pages"]) -> DecodeBatch:
    """The state of the sequences in slots; those whose prompt is not prefilled yet do nothing. `table`: see `pack_table`."""
    batch_size = len(slots)
    last, cached, num_generated = (np.zeros((batch_size,), np.int32) for _ in range(3))
    is_active = np.zeros((batch_size,), bool)
    for slot, sequence in enumerate(slots):
        if sequence is None or not sequence.is_ready:
            continue
        last[slot], cached[slot] = sequence.token_ids[-1], sequence.num_computed
        num_generated[slot] = sequence.num_output
        is_active[slot] = True
    return DecodeBatch(last, cached, num_generated, is_active, table)


def _fill_up(parts: Seq[Float[np.ndarray, "_ D"]], num_rows: int) -> Float[np.ndarray, "M D"]:
    """Concatenated features, padded with zeros."""
    filled = np.zeros((num_rows, parts[0].shape[1]), parts[0].dtype)
    end = 0
    for part in parts:
        filled[end : end + len(part)] = part
        end += len(part)
    return filled
