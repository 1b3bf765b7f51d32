"""MFA's parts against plain numpy: rotary embedding, shared key/value head, cache rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels.pages import empty_pages
from step3_jax.config import TextConfig
from step3_jax.cpu_kernels.loader import Kernels, find_kernels
from step3_jax.layers.attention import (
    MFA,
    NO_PAGE,
    CacheStep,
    attend,
    attention_context,
)
from step3_jax.layers.rope import apply_rope, rope_table

HEAD_DIM, THETA = 8, 500000.0


def rotate(vector, position):
    """Neox: pair (i, i + K/2) rotated by position * theta^(-2i/K)."""
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


def test_a_decode_step_stands_at_the_end_of_each_sequence():
    config = TextConfig(head_dim=HEAD_DIM)
    table = jnp.asarray([[4, 9], [7, 3], [5, 5]])
    context = attention_context(config, (3, 2), step=CacheStep(table, jnp.asarray([2, 66, 0])))
    cos, _ = rope_table(jnp.asarray([[0, 1], [64, 65], [0, 0]]), head_dim=HEAD_DIM, theta=THETA)
    np.testing.assert_array_equal(context.cos, cos)
    np.testing.assert_array_equal(context.page_ids, [4, 4, 3, 3, NO_PAGE, NO_PAGE])
    np.testing.assert_array_equal(context.slots[:4], [0, 1, 0, 1])
    assert context.mask is None


def test_a_packed_chunk_gives_each_token_its_sequence_and_place():
    config = TextConfig(head_dim=HEAD_DIM)
    table = jnp.asarray([[1, 2], [0, 0], [3, 4], [0, 0]])
    # Two tokens after a prefix of 63, none, three at the start, none; then padding.
    step = CacheStep(table, jnp.asarray([65, 0, 3, 0]), jnp.asarray([0, 2, 2, 5, 5]))
    context = attention_context(config, (1, 8), step=step)
    cos, _ = rope_table(jnp.asarray([[63, 64, 0, 1, 2, 0, 0, 0]]), head_dim=HEAD_DIM, theta=THETA)
    np.testing.assert_array_equal(context.cos, cos)
    np.testing.assert_array_equal(context.page_ids, [1, 2, 3, 3, 3, NO_PAGE, NO_PAGE, NO_PAGE])
    np.testing.assert_array_equal(context.slots[:5], [63, 0, 0, 1, 2])


def test_given_positions_change_the_rotation_and_not_the_mask():
    config = TextConfig(head_dim=HEAD_DIM)
    plain = attention_context(config, (1, 3))
    moved = attention_context(config, (1, 3), positions=jnp.asarray([[7, 7, 9]]))
    np.testing.assert_array_equal(plain.mask, moved.mask)
    assert np.abs(np.asarray(plain.cos - moved.cos)).max() > 0.1


@pytest.mark.parametrize("has_kernels", [False, True])
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "fp8"])
def test_attention_over_pages_in_chunks_and_steps_is_that_without_a_cache(storage, has_kernels):
    """Two sequences: the first read in two chunks and two single steps, the second in one chunk beside the first's."""
    config = TextConfig(
        hidden_size=32, head_dim=32, num_attention_heads=2, share_q_dim=16, num_hidden_layers=1, moe_layers=()
    )
    layer = MFA(config, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
    if has_kernels:
        kernels = find_kernels()
        if not isinstance(kernels, Kernels):
            pytest.skip(kernels.reason)
        layer.cpu_kernels = kernels
    graphdef, state = nnx.split(layer)
    hidden = jax.random.normal(jax.random.key(1), (2, 90, 32))

    @jax.jit
    def run(state, hidden, pages, step):
        return nnx.merge(graphdef, state)(hidden, attention_context(config, hidden.shape[:2], step=step), pages)

    whole, _ = run(state, hidden, None, None)
    pages = empty_pages(5, 32, storage, as_bits=True)
    table = jnp.asarray([[3, 1], [0, 2]])
    found = np.zeros(whole.shape, np.float32)

    def chunk(pages, parts, size):
        """Reads `parts`: for each sequence the first and the last token."""
        counts = [end - begin for begin, end in parts]
        packed = np.zeros((1, size, 32), np.float32)
        packed[0, : sum(counts)] = np.concatenate([hidden[row, begin:end] for row, (begin, end) in enumerate(parts)])
        starts = jnp.asarray(np.cumsum([0, *counts]))
        ends = jnp.asarray([end for _, end in parts])
        out, pages = run(state, jnp.asarray(packed), pages, CacheStep(table, ends, starts))
        for row, (begin, end) in enumerate(parts):
            found[row, begin:end] = out[0, starts[row] : starts[row + 1]]
        return pages

    pages = chunk(pages, [(0, 30), (0, 0)], 128)
    pages = chunk(pages, [(30, 88), (0, 61)], 128)
    step = CacheStep(table, jnp.asarray([89, 0]))
    assert ("step3_attend" in run.lower(state, hidden[:, :1], pages, step).as_text()) == (
        has_kernels and storage != "fp8"
    )
    for place in (88, 89):
        out, pages = run(state, hidden[:, place : place + 1], pages, CacheStep(table, jnp.asarray([place + 1, 0])))
        found[0, place] = out[0, 0]
    tolerance = {"float32": 1e-5, "bfloat16": 0.02, "fp8": 0.1}[storage] * float(jnp.abs(whole).max())
    np.testing.assert_allclose(found[0], whole[0], atol=tolerance, rtol=0)
    np.testing.assert_allclose(found[1, :61], whole[1, :61], atol=tolerance, rtol=0)
    # No sequence owns the fifth page.
    assert not np.asarray(pages.keys[4]).any()


def test_padding_in_front_of_a_steps_tokens_is_written_nowhere():
    config = TextConfig(head_dim=HEAD_DIM, rope_theta=THETA)
    table, lengths = jnp.asarray([[7, 5], [3, 9], [1, 2]]), jnp.asarray([66, 2, 0])
    step = CacheStep(table, lengths, num_new=jnp.asarray([3, 1, 1]))
    context = attention_context(config, (3, 3), step=step)
    page_ids = np.asarray(context.page_ids).reshape(3, 3)
    assert page_ids.tolist() == [[7, 5, 5], [NO_PAGE, NO_PAGE, 3], [NO_PAGE] * 3]
    assert np.asarray(context.slots).reshape(3, 3)[0].tolist() == [63, 0, 1]
