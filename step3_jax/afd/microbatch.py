"""Cuts a batch into micro-batches and joins their reports: pure functions on one attention device's own rows.

The rows of a decode batch are cut into equal parts. A chunk of prompts is cut by tokens, wherever that falls: a later
part attends to what an earlier one has written to the cache in the same layer.
"""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from step3_jax.engine.state import DecodeBatch, PrefillBatch, Report
from step3_jax.sampling.batch import SamplingBatch

T = TypeVar("T")


def part_size(size: int, num_parts: int) -> tuple[int, int]:
    """Size and number of the parts that `size` rows or tokens are cut into: at most `num_parts`, none if `size` is 0."""
    each = -(-size // min(num_parts, size))
    return each, -(-size // each)


def split_decode(
    batch: DecodeBatch, sampling: SamplingBatch, num_parts: int
) -> list[tuple[DecodeBatch, SamplingBatch]]:
    """Parts of a decode batch; the last one is padded with idle rows."""
    return split_rows((batch, sampling), batch.last.shape[0], num_parts)


def split_rows(tree: T, num_rows: int, num_parts: int) -> list[T]:
    """Parts of arrays that have one entry per row; the last part is padded with zeros."""
    _, count = part_size(num_rows, num_parts)
    stacked = stack_rows(tree, num_rows, num_parts)
    return [jax.tree.map(lambda leaf, part=part: leaf[part], stacked) for part in range(count)]


def stack_rows(tree: T, num_rows: int, num_parts: int) -> T:
    """The same parts in one array each, [parts, rows of a part, ...]."""
    each, count = part_size(num_rows, num_parts)

    def stack(leaf: Array) -> Array:
        filled = jnp.pad(leaf, ((0, each * count - num_rows), *((0, 0),) * (leaf.ndim - 1)))
        return filled.reshape(count, each, *leaf.shape[1:])

    return jax.tree.map(stack, tree)


def split_chunk(batch: PrefillBatch, num_parts: int) -> list[PrefillBatch]:
    """Parts of a chunk; the last part is padded after its last token.

    For each sequence, the arrays of a part say which of its tokens are in the part, and how many of its tokens are in
    the cache once the part is prefilled. Image features stay whole.
    """
    tokens, starts, lengths = batch.token_ids, batch.query_starts, batch.lengths
    each, count = part_size(tokens.shape[0], num_parts)
    padding = (0, each * count - tokens.shape[0])
    tokens = jnp.pad(tokens, padding)
    rows = None if batch.feature_rows is None else jnp.pad(batch.feature_rows, padding, constant_values=-1)
    parts = []
    for part in range(count):
        first, last = part * each, (part + 1) * each
        inside = jnp.clip(starts, first, last) - first
        missing = jnp.maximum(starts[1:] - last, 0)
        has_tokens = inside[1:] > inside[:-1]
        parts.append(
            PrefillBatch(
                tokens[first:last],
                inside,
                # A sequence without tokens in this part counts as absent, whatever it has in the cache.
                jnp.where(has_tokens, lengths - missing, 0),
                batch.table,
                batch.features,
                None if rows is None else rows[first:last],
            )
        )
    return parts


def merge_stacked(report: Report, num_rows: int) -> Report:
    """The report of `num_rows` rows, from their parts' report, stacked as [parts, rows of a part, ...]."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:num_rows], report)


def merge_reports(reports: list[Report], num_rows: int) -> Report:
    """The report of `num_rows` rows, from those of their parts."""

    def join(*leaves: Array) -> Array:
        return jnp.concatenate(leaves)[:num_rows]

    return jax.tree.map(join, *reports)
