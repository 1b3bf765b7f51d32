"""Which worker reads what: the blocks of all sequences, concatenated, are cut into equal spans, one for each worker.

A worker (one CTA of a persistent grid) then has an equal share of the work whatever the lengths are. Its part of a
sequence is a fragment; fragment `b + g` is worker g's part of sequence b. From one fragment to the next either the worker
or the sequence advances by one, so these numbers are all different, and those of one sequence are consecutive.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

# Tokens that the kernel processes at a time: the rows of one shared-memory tile.
BLOCK = 64


class Plan(NamedTuple):
    """The division of a batch. All int32.

    Attributes:
      lengths: Cached tokens of each sequence, limited to what its table can hold.
      starts: Blocks before each sequence, and at the end the total.
      spans: For each worker: first block, end block, first sequence, number of sequences (0 if it has no work).
      fragments: For each sequence: first fragment, number of fragments.
    """

    lengths: Int[Array, " B"]
    starts: Int[Array, " B1"]
    spans: Int[Array, "G 4"]
    fragments: Int[Array, "B 2"]


def plan_work(lengths: Int[Array, " B"], *, capacity: int, workers: int, min_blocks: int) -> Plan:
    """Cuts the batch into `workers` spans of equal size; only the last may be smaller than `min_blocks`.

    If all sequences are equally long, spans grow by up to a tenth if their ends then coincide with the sequences' ends: each
    cut costs a partial result that is written and read again.

    Args:
      lengths: Cached tokens of each sequence.
      capacity: Tokens that a row of the table can hold; longer sequences are truncated.
      workers: Number of spans.
      min_blocks: The minimum that makes a worker worth starting.
    """
    batch = lengths.shape[0]
    lengths = jnp.clip(lengths, 0, capacity).astype(jnp.int32)
    blocks = -(-lengths // BLOCK)
    # Sums by comparison: one fusion each on a GPU, where a scan or a search is a chain of kernels.
    before = jnp.arange(batch + 1)[:, None] > jnp.arange(batch)
    starts = jnp.sum(jnp.where(before, blocks, 0), axis=1, dtype=jnp.int32)
    ends, total = starts[1:], starts[-1]

    share = jnp.maximum(-(-total // workers), min_blocks)
    longest = jnp.max(blocks)
    cuts = jnp.maximum(longest // share, 1)
    whole = jnp.where(longest < share, -(-share // jnp.maximum(longest, 1)) * longest, -(-longest // cuts))
    is_even = jnp.all((blocks == 0) | (blocks == longest))
    share = jnp.where(is_even & (10 * whole <= 11 * share), jnp.maximum(whole, 1), share)

    first = jnp.minimum(jnp.arange(workers, dtype=jnp.int32) * share, total)
    end = jnp.minimum(first + share, total)
    first_sequence = jnp.sum(ends <= first[:, None], axis=1)
    last_sequence = jnp.sum(ends <= (end - 1)[:, None], axis=1)
    num_sequences = jnp.where(first < end, last_sequence - first_sequence + 1, 0)
    spans = jnp.stack([first, end, first_sequence, num_sequences], axis=1).astype(jnp.int32)

    first_worker, last_worker = starts[:-1] // share, (ends - 1) // share
    num_fragments = jnp.where(blocks > 0, last_worker - first_worker + 1, 0)
    fragments = jnp.stack([first_worker + jnp.arange(batch), num_fragments], axis=1).astype(jnp.int32)
    return Plan(lengths, starts, spans, fragments)


def num_fragments(batch: int, workers: int) -> int:
    """The maximum number of fragments; some may belong to no worker, and are then not written."""
    return batch + workers - 1
