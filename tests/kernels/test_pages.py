"""Pages of the KV cache: what is stored comes back, from where it was put, at the promised size."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.pages import contiguous_pages, decode_rows, empty_pages, encode_rows, gather_rows, write_rows
from pallas_kernels.storage import Storage, bytes_per_token

STORAGES: tuple[Storage, ...] = ("float32", "bfloat16", "fp8", "int4")
# Largest error of a row over its largest number: half a step of the format there (of e4m3 between 256 and 448 it is 16).
HALF_STEP = {"float32": 0.0, "bfloat16": 2**-8, "fp8": 16 / 448, "int4": 0.5 / 7 + 2**-8}


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_rows_come_back_within_half_a_step(storage: Storage, head_dim: int) -> None:
    rows = jax.random.normal(jax.random.key(0), (37, head_dim)) * 10.0 ** jnp.arange(-18, 19)[:, None]
    stored, scales = encode_rows(rows, storage)
    back = decode_rows(stored, scales, jnp.float32)
    error = np.max(np.abs(np.asarray(back) - np.asarray(rows)), axis=1)
    assert np.all(error <= HALF_STEP[storage] * np.max(np.abs(rows), axis=1) * 1.001)


@pytest.mark.parametrize("storage", STORAGES)
def test_zeros_come_back_as_zeros(storage: Storage) -> None:
    stored, scales = encode_rows(jnp.zeros((3, 64)), storage)
    assert np.all(np.asarray(decode_rows(stored, scales, jnp.float32)) == 0)
    pages = empty_pages(2, 64, storage, page_size=8)
    keys, values = gather_rows(pages, jnp.array([[1]]), jnp.float32)
    assert storage == "int4" or np.all(np.asarray(keys) == 0)
    assert storage == "int4" or np.all(np.asarray(values) == 0)


def test_int4_packs_the_two_halves_of_a_row_in_one_byte() -> None:
    rows = jnp.concatenate([jnp.full((1, 64), value) for value in (7.0, -7.0, 0.0, 14.0)], axis=1)
    stored, scales = encode_rows(rows, "int4")
    assert stored.dtype == jnp.uint8
    assert stored.shape == (1, 128)
    # A zero has no sign.
    assert np.all(np.asarray(stored)[0, :64] == 7)
    assert np.all(np.asarray(stored)[0, 64:] == 0b1000_0111 + (7 << 4))
    assert np.asarray(scales).astype(float).tolist() == [[1.0, 1.0, 1.0, 2.0]]
    # What the kernels turn it into: numbers of e4m3, times 2^9.
    first = np.asarray(stored & 0b1000_0111).view(jnp.float8_e4m3fn).astype(float) * 2**9
    assert first[0, 0] == 7
    assert first[0, 64] == -7


@pytest.mark.parametrize("storage", STORAGES)
def test_tokens_are_written_to_their_slots_and_nowhere_else(storage: Storage) -> None:
    keys, values = jax.random.normal(jax.random.key(1), (2, 3, 64))
    empty = empty_pages(4, 64, storage, page_size=8)
    pages = write_rows(empty, keys, values, jnp.array([2, 0, 4]), jnp.array([7, 0, 3]))
    for written, blank, rows in ((pages.keys, empty.keys, keys), (pages.values, empty.values, values)):
        stored, _ = encode_rows(rows, storage)
        got, before = np.asarray(written).copy(), np.asarray(blank)
        assert np.array_equal(got[2, 7], stored[0])
        assert np.array_equal(got[0, 0], stored[1])
        got[2, 7], got[0, 0] = before[2, 7], before[0, 0]
        # The third token's page does not exist, so it is dropped.
        assert np.array_equal(got, before)
    back, _ = gather_rows(pages, jnp.array([[2, 0]]), jnp.float32)
    stored, scales = encode_rows(keys, storage)
    expected = decode_rows(stored, scales, jnp.float32)
    assert np.array_equal(np.asarray(back)[0, [7, 8]], np.asarray(expected)[:2])


@pytest.mark.parametrize(("storage", "size"), [("float32", 2048), ("bfloat16", 1024), ("fp8", 520), ("int4", 272)])
def test_a_token_takes_the_bytes_that_the_table_says(storage: Storage, size: int) -> None:
    assert bytes_per_token(256, storage) == size
    pages = empty_pages(3, 256, storage)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(pages)) == 3 * 64 * size
    assert (pages.storage, pages.page_size, pages.head_dim) == (storage, 64, 256)


def test_a_contiguous_cache_is_pages_with_a_table_that_counts() -> None:
    keys, values = jax.random.normal(jax.random.key(2), (2, 3, 24, 64))
    pages, table = contiguous_pages(keys, values, page_size=8)
    assert table.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    got = gather_rows(pages, table, jnp.float32)
    assert np.array_equal(got[0], keys)
    assert np.array_equal(got[1], values)


def test_bad_pages_are_refused_with_what_is_allowed() -> None:
    with pytest.raises(ValueError, match="multiple of 64; it is 96"):
        empty_pages(1, 96, "int4")
    with pytest.raises(ValueError, match="20 tokens are not whole pages of 8"):
        contiguous_pages(jnp.zeros((1, 20, 64)), jnp.zeros((1, 20, 64)), page_size=8)
    with pytest.raises(ValueError, match="float16; allowed without scales"):
        contiguous_pages(jnp.zeros((1, 8, 64), jnp.float16), jnp.zeros((1, 8, 64), jnp.float16), page_size=8)


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_tokens_go_to_their_places_and_those_without_a_page_nowhere(num_tokens):
    pages = empty_pages(3, 8, "float32")
    rows = jnp.arange(1.0, num_tokens + 1)[:, None] * jnp.ones((num_tokens, 8))
    ids, slots = jnp.asarray([2, 2**30, 0][:num_tokens]), jnp.asarray([5, 6, 63][:num_tokens])
    found = jax.jit(write_rows)(pages, rows, -rows, ids, slots)
    want = np.zeros((3, 64, 8), np.float32)
    want[2, 5] = 1
    if num_tokens == 3:
        want[0, 63] = 3
    np.testing.assert_array_equal(found.keys, want)
    np.testing.assert_array_equal(found.values, -want)
