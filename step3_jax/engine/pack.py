"""From sequences to the arrays of a call: numpy, which executors place on their devices."""

from __future__ import annotations

import collections
from collections.abc import Sequence as Seq

import numpy as np
from jaxtyping import Float, Int

from pallas_kernels.pages import PAGE_SIZE
from step3_jax.cache.bucket import bucket, power_of_two
from step3_jax.engine.scheduler import Chunk, Scheduler
from step3_jax.engine.sequence import Sequence, feature_rows
from step3_jax.engine.state import DecodeBatch, DecodeCall, PrefillBatch
from step3_jax.sampling.batch import SamplingBatch, SamplingRow, sampling_batch
from step3_jax.sampling.params import SamplingParams

MIN_CHUNK_TOKENS = 32
MIN_FEATURE_ROWS = 64
# What stands in a slot that is free.
_IDLE = SamplingRow(SamplingParams(temperature=0.0), 0, (0, 0), ())


class Packer:
    """Makes the arrays of an engine's calls; what depends on slots alone is kept until they change."""

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_pages: int,
        num_shards: int,
        vocab_size: int,
    ) -> None:
        """Takes the limits.

        Args:
          max_num_seqs: Most sequences of a shard.
          max_num_batched_tokens: Most tokens that a shard prefills at once.
          max_pages: Most pages of a sequence.
          num_shards: Shards of the cache.
          vocab_size: V.
        """
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_pages = max_pages
        self._num_shards = num_shards
        self._vocab_size = vocab_size
        self._slots: tuple[int, SamplingBatch] | None = None
        self._empty_history: Int[np.ndarray, "B M"] | None = None
        self._table: tuple[int, Int[np.ndarray, "B width"]] | None = None

    def chunk(self, chunks: Seq[Chunk], shards: Seq[int]) -> PrefillBatch:
        """The arrays of some chunks, each of a sequence in one of `shards`."""
        return pack_chunk(
            chunks,
            max_num_seqs=self._max_num_seqs,
            max_num_batched_tokens=self._max_num_batched_tokens,
            max_pages=self._max_pages,
            shards=shards,
            num_shards=self._num_shards,
        )

    def decode(self, scheduler: Scheduler, num_steps: int, *, max_steps: int) -> DecodeCall:
        """The decode call of the sequences in slots; see `DecodeCall` for its numbers."""
        if self._slots is None or self._slots[0] != scheduler.version:
            self._slots = scheduler.version, pack_sampling(scheduler.slots, self._vocab_size)
        if self._table is None or self._table[0] != scheduler.table_version:
            self._table = scheduler.table_version, pack_table(scheduler.slots, self._max_pages)
        batch = pack_decode(scheduler.slots, self._table[1])._replace(history=self._pack_history(scheduler))
        return DecodeCall(batch, self._slots[1], num_steps, max_steps=max_steps, leave_early=scheduler.num_waiting > 0)

    def _pack_history(self, scheduler: Scheduler) -> Int[np.ndarray, "B M"]:
        """Tokens of the sequences in slots whose tokens are counted; the same array while there are none."""
        slots, width = scheduler.slots, self._max_pages * PAGE_SIZE
        if self._empty_history is None or len(self._empty_history) != len(slots):
            self._empty_history = np.full((len(slots), width), self._vocab_size, np.int32)
        counted = [
            (slot, one)
            for slot, one in enumerate(slots)
            if one is not None and one.is_ready and one.sampling.params.has_penalties
        ]
        if not counted:
            return self._empty_history
        history = self._empty_history.copy()
        for slot, sequence in counted:
            history[slot, : len(sequence.token_ids)] = sequence.token_ids
        return history


def pack_chunk(
    chunks: Seq[Chunk],
    *,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_pages: int,
    shards: Seq[int] | None = None,
    num_shards: int = 1,
) -> PrefillBatch:
    """One array of all tokens, as long as its bucket; sequences and table width are always the most there can be.

    Where the cache is in shards, each array is that of one shard behind the other, all of the longest one's bucket.

    Args:
      chunks: What to prefill. Groups with image places in them have their features.
      max_num_seqs: Sequences of a shard's table.
      max_num_batched_tokens: Length of a shard's largest bucket.
      max_pages: Width of the table.
      shards: Shard of each chunk; 0 if absent.
      num_shards: Shards there are.
    """
    own_shards = [0] * len(chunks) if shards is None else shards
    totals = np.zeros((num_shards,), np.int32)
    for shard, chunk in zip(own_shards, chunks, strict=True):
        totals[shard] += chunk.num_tokens
    length = bucket(int(totals.max()), min(MIN_CHUNK_TOKENS, max_num_batched_tokens), max_num_batched_tokens)
    token_ids = np.zeros((num_shards, length), np.int32)
    starts = np.repeat(totals[:, None], max_num_seqs + 1, axis=1)
    lengths = np.zeros((num_shards, max_num_seqs), np.int32)
    table = np.zeros((num_shards, max_num_seqs, max_pages), np.int32)
    rows = np.full((num_shards, length), -1, np.int32)
    features: list[Float[np.ndarray, "places D"]] = []
    filled: collections.Counter[int] = collections.Counter()
    places: collections.Counter[int] = collections.Counter()
    for shard, chunk in zip(own_shards, chunks, strict=True):
        sequence, end = chunk.sequence, chunk.start + chunk.num_tokens
        place, first = places[shard], filled[shard]
        starts[shard, place] = first
        token_ids[shard, first : first + chunk.num_tokens] = sequence.token_ids[chunk.start : end]
        lengths[shard, place] = end
        table[shard, place, : len(sequence.pages)] = sequence.pages
        own_rows = feature_rows(sequence.group, chunk.start, end)
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
        table.reshape(-1, max_pages),
        _fill_up(features) if features else None,
        rows.reshape(-1) if features else None,
    )


def pack_table(slots: Seq[Sequence | None], max_pages: int) -> Int[np.ndarray, "B width"]:
    """Pages of the sequences in slots, as wide as the bucket of the longest."""
    width = bucket(max((len(one.pages) for one in slots if one is not None), default=1), 1, max_pages)
    table = np.zeros((len(slots), width), np.int32)
    for slot, sequence in enumerate(slots):
        if sequence is not None:
            table[slot, : len(sequence.pages)] = sequence.pages
    return table


def pack_sampling(slots: Seq[Sequence | None], vocab_size: int) -> SamplingBatch:
    """Parameters of the sequences in slots."""
    rows = [_IDLE if sequence is None else sequence.sampling for sequence in slots]
    return sampling_batch(rows, vocab_size, len(slots))


def pack_decode(slots: Seq[Sequence | None], table: Int[np.ndarray, "B width"]) -> DecodeBatch:
    """Where the sequences in slots stand; those whose prompt is not prefilled yet do nothing. `table` is `pack_table`'s."""
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


def _fill_up(parts: Seq[Float[np.ndarray, "_ D"]]) -> Float[np.ndarray, "M D"]:
    """Features one after the other, filled up to a power of two, so that few numbers of images make programs."""
    features = np.concatenate(parts)
    num_rows = max(MIN_FEATURE_ROWS, power_of_two(features.shape[0]))
    return np.pad(features, ((0, num_rows - features.shape[0]), (0, 0)))
