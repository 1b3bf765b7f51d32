"""MFA's parts against plain numpy: rotary embedding, shared key/value head, cache rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from step3_jax.config import TextConfig
from step3_jax.layers.attention import attend, attention_context, write_rows
from step3_jax.layers.rope import apply_rope, rope_table

HEAD_DIM, THETA = 8, 500000.0


def rotate(vector, position):
    """Neox: pair (i, i + K/2) turned by position * theta^(-2i/K)."""
    half = HEAD_DIM // 2
    out = np.empty(HEAD_DIM)
    for i in range(half):
        angle = position * THETA ** (-2 * i / HEAD_DIM)
        a, b = vector[i], vector[i + half]
        out[i], out[i + half] = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)
    return out


def test_rotary_embedding_pairs_halves_over_the_whole_head():
    rng = np.random.default_rng(0)
    heads = rng.normal(size=(1, 3, 2, HEAD_DIM)).astype(np.float32)
    positions = np.array([[0, 5, 1000]], np.int32)
    cos, sin = rope_table(jnp.asarray(positions), head_dim=HEAD_DIM, theta=THETA)
    found = np.asarray(apply_rope(jnp.asarray(heads), cos, sin))
    for token, position in enumerate(positions[0]):
        for head in range(2):
            np.testing.assert_allclose(found[0, token, head], rotate(heads[0, token, head], position), atol=2e-4)


def test_all_heads_share_one_key_and_value_head():
    rng = np.random.default_rng(1)
    queries, keys, values = (
        rng.normal(size=shape).astype(np.float32) for shape in ((1, 4, 3, 8), (1, 4, 8), (1, 4, 8))
    )
    mask = np.tril(np.ones((1, 4, 4), bool))
    found = np.asarray(attend(*(jnp.asarray(array) for array in (queries, keys, values, mask))))
    for token in range(4):
        for head in range(3):
            scores = keys[0, : token + 1] @ queries[0, token, head] / np.sqrt(8)
            weights = np.exp(scores) / np.exp(scores).sum()
            np.testing.assert_allclose(found[0, token, head], weights @ values[0, : token + 1], atol=1e-5)


def test_context_counts_positions_from_the_starts():
    config = TextConfig(head_dim=HEAD_DIM)
    context = attention_context(config, (2, 2), starts=jnp.asarray([0, 3]), cache_length=6)
    np.testing.assert_array_equal(context.mask[0], [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(context.mask[1], [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]])
    cos, _ = rope_table(jnp.asarray([[0, 1], [3, 4]]), head_dim=HEAD_DIM, theta=THETA)
    np.testing.assert_array_equal(context.cos, cos)


def test_given_positions_change_the_rotation_and_not_the_mask():
    config = TextConfig(head_dim=HEAD_DIM)
    plain = attention_context(config, (1, 3))
    moved = attention_context(config, (1, 3), positions=jnp.asarray([[7, 7, 9]]))
    np.testing.assert_array_equal(plain.mask, moved.mask)
    assert np.abs(np.asarray(plain.cos - moved.cos)).max() > 0.1


@pytest.mark.parametrize("starts", [[2], [0, 3]])
def test_rows_are_written_at_each_sequences_own_start(starts):
    cache = jnp.zeros((len(starts), 6, 2))
    rows = jnp.ones((len(starts), 2, 2))
    found = np.asarray(jax.jit(write_rows)(cache, rows, jnp.asarray(starts)))
    for sequence, start in enumerate(starts):
        np.testing.assert_array_equal(
            found[sequence].sum(-1), [2.0 if start <= row < start + 2 else 0 for row in range(6)]
        )
