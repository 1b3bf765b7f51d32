"""Prefill attention: reference against float64, interpreter against reference, lowering for CUDA at real shapes."""

from __future__ import annotations

import functools
import pathlib
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat
from pallas_kernels.mfa_prefill import dense, dense_attention, mfa_prefill, mosaic, reference, tile
from pallas_kernels.pages import CachedTokens, empty_pages, gather_rows, write_rows
from tests.kernels.support import lower_for_cuda, row_errors

ROOT = pathlib.Path(__file__).resolve().parents[2]
STORAGES = ("float32", "bfloat16", "fp8", "int4")
# Rounding of the weights to 16 bits; int4 is decoded to bfloat16 by the kernel and not by the reference in float32.
TOLERANCE = {"bfloat16": 6e-3, "fp8": 4e-3, "int4": 8e-3}
# (new tokens, cached tokens) of each sequence: absent; one token alone; about the end of a page; a chunk behind a prefix
# that ends on and within a page; whole prompts.
EDGES = ((0, 0), (1, 1), (3, 63), (2, 64), (3, 65), (0, 30), (5, 129), (7, 7))


class Case(NamedTuple):
    """Arguments of `mfa_prefill`."""

    queries: jax.Array
    cached: CachedTokens
    query_starts: jax.Array


def make_case(
    storage: str,
    sequences: Sequence[tuple[int, int]] = EDGES,
    *,
    heads: int = 8,
    head_dim: int = 256,
    padding: int = 2,
    page_size: int = 64,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> Case:
    """Random sequences on scattered pages; everything that is not a token's row is NaN, as are queries after the last."""
    counts, lengths = (np.array(column, np.int32) for column in zip(*sequences, strict=True))
    max_pages = max(1, -(-int(lengths.max()) // page_size)) + 1
    keys = jax.random.split(jax.random.key(len(sequences) + heads), 4)
    num_pages = len(sequences) * max_pages + 3
    generator = np.random.default_rng(0)
    table = generator.permutation(num_pages)[: len(sequences) * max_pages].reshape(-1, max_pages).astype(np.int32)
    pages = empty_pages(num_pages, head_dim, storage, page_size=page_size)
    # uint8 has no NaN: there the scales poison.
    pages = jax.tree.map(lambda part: part if part.dtype == jnp.uint8 else jnp.full_like(part, jnp.nan), pages)
    tokens = [np.arange(length) for length in lengths]
    ids = np.concatenate([table[row, token // page_size] for row, token in enumerate(tokens)])
    slots = np.concatenate(tokens) % page_size
    new_keys, new_values = (jax.random.normal(key, (len(ids), head_dim)) for key in keys[:2])
    # Rows of very different size: their scales differ.
    new_values = new_values * jnp.exp(2 * jax.random.normal(keys[3], (len(ids), 1)))
    pages = write_rows(pages, new_keys, new_values, jnp.asarray(ids), jnp.asarray(slots, jnp.int32))
    total = int(counts.sum())
    queries = jax.random.normal(keys[2], (total + padding, heads, head_dim)).at[total:].set(jnp.nan).astype(dtype)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return Case(queries, CachedTokens(pages, jnp.asarray(table), jnp.asarray(lengths)), jnp.asarray(starts))


def exact_prefill(case: Case) -> np.ndarray:
    """The formula in float64, token by token."""
    cached = case.cached
    queries, starts, lengths = (np.asarray(part) for part in (case.queries, case.query_starts, cached.lengths))
    decoded = gather_rows(cached.pages, cached.table, jnp.dtype("float32"))
    keys, values = (np.asarray(rows, np.float64) for rows in decoded)
    out = np.zeros(queries.shape)
    for row, length in enumerate(lengths):
        for token in range(starts[row], starts[row + 1]):
            end = length - starts[row + 1] + token + 1
            scores = queries[token].astype(np.float64) @ keys[row, :end].T * queries.shape[-1] ** -0.5
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[token] = weights / weights.sum(axis=1, keepdims=True) @ values[row, :end]
    return out


def exact_dense(
    queries: jax.Array, keys: jax.Array, values: jax.Array, lengths: Sequence[int], causal: bool
) -> np.ndarray:
    """The formula in float64, head by head."""
    q, k, v = (np.asarray(array).astype(np.float64) for array in (queries, keys, values))
    out = np.zeros(q.shape)
    for row, length in enumerate(lengths):
        for head in range(q.shape[2]):
            shared = head // (q.shape[2] // k.shape[2])
            for token in range(q.shape[1]):
                end = min(length, token + 1) if causal else length
                if end:
                    scores = k[row, :end, shared] @ q[row, token, head] * q.shape[-1] ** -0.5
                    weights = np.exp(scores - scores.max())
                    out[row, token, head] = weights / weights.sum() @ v[row, :end, shared]
    return out


def dense_case(
    dtype: jax.typing.DTypeLike, batch: int, queries: int, keys: int, heads: tuple[int, int], head_dim: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    shapes = ((queries, heads[0]), (keys, heads[1]), (keys, heads[1]))
    rngs = jax.random.split(jax.random.key(0), 3)
    return tuple(
        jax.random.normal(rng, (batch, *shape, head_dim)).astype(dtype) for rng, shape in zip(rngs, shapes, strict=True)
    )


def interpret(case: Case, **options: int | bool) -> jax.Array:
    """The kernel in the interpreter; raises if that saw a race."""
    queries, cached, starts = case
    run = functools.partial(mosaic.mfa_prefill, scale=queries.shape[-1] ** -0.5, interpret=True, **options)
    with compat.race_check():
        return jax.block_until_ready(run(queries, cached.pages, cached.table, starts, cached.lengths))


def test_tiles_cover_every_token_once_and_stay_in_their_sequence() -> None:
    starts, lengths = jnp.array([0, 0, 5, 6, 14]), jnp.array([9, 25, 1, 8])
    tiles, count = tile.make_tiles(starts, lengths, num_tokens=17, tile_tokens=4, max_keys=64)
    owners = np.full(17, -1)
    for index in range(len(tiles.first)):
        one = jax.tree.map(lambda column, index=index: int(column[index]), tiles)
        own = np.arange(one.first + one.begin, one.first + one.end)
        assert (own.size > 0) == (index < int(count))
        assert 0 <= one.first <= 17 - 4
        assert (owners[own] == -1).all()
        owners[own] = one.sequence if one.length else 4
        if own.size and one.length:
            assert one.num_keys == one.position + one.end
    np.testing.assert_array_equal(owners, [1] * 5 + [2] + [3] * 8 + [4] * 3)


@pytest.mark.parametrize("storage", STORAGES)
def test_reference_is_the_formula(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Several tiles per sequence and several blocks per tile.
    monkeypatch.setattr(reference, "TILE_ROWS", 12)
    monkeypatch.setattr(reference, "BLOCK_KEYS", 128)
    case = make_case(storage, heads=4, head_dim=128, dtype=jnp.float32)
    actual = np.asarray(mfa_prefill(*case, implementation="reference"))
    assert row_errors(actual, exact_prefill(case)).max() < 3e-6
    assert not actual[-2:].any()


@pytest.mark.parametrize("storage", ["bfloat16", "fp8"])
def test_reference_memory_grows_neither_with_the_length_nor_with_the_pages(storage: str) -> None:
    def temporary_bytes(num_pages: int, max_pages: int) -> int:
        shapes = (
            jax.ShapeDtypeStruct((256, 16, 128), jnp.float32),
            CachedTokens(
                jax.eval_shape(lambda: empty_pages(num_pages, 128, storage)),
                jax.ShapeDtypeStruct((1, max_pages), jnp.int32),
                jax.ShapeDtypeStruct((1,), jnp.int32),
            ),
            jax.ShapeDtypeStruct((2,), jnp.int32),
        )
        return jax.jit(mfa_prefill).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(4096, 1024) < 1.1 * temporary_bytes(64, 64)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [None, (0, 21)])
def test_dense_reference_is_the_formula(
    causal: bool, lengths: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tiles of 5 queries, the last one moved back.
    monkeypatch.setattr(reference, "DENSE_SCORE_BYTES", 5 * 2 * 4 * 25 * 4)
    queries, keys, values = dense_case(jnp.float32, 2, 23, 25, (4, 2), 24)
    if lengths is not None:
        keys, values = (array.at[1, 21:].set(jnp.nan) for array in (keys, values))
    given = None if lengths is None else jnp.array(lengths)
    actual = dense_attention(queries, keys, values, lengths=given, causal=causal, implementation="reference")
    expected = exact_dense(queries, keys, values, lengths or (25, 25), causal)
    assert row_errors(actual.reshape(-1, 24), expected.reshape(-1, 24)).max() < 3e-6


@pytest.mark.kernels
def test_kernel_equals_the_formula_on_bfloat16_pages() -> None:
    case = make_case("bfloat16", heads=64, sequences=((1, 1), (0, 0), (3, 65)), padding=1)
    actual = np.asarray(interpret(case))
    assert row_errors(actual, exact_prefill(case)).max() < TOLERANCE["bfloat16"]
    assert not actual[-1:].any()


def test_kernel_equals_the_formula_on_fp8_pages_without_races() -> None:
    case = make_case("fp8", heads=16, sequences=((9, 193), (0, 0), (1, 64)), padding=1)
    actual = np.asarray(interpret(case, detect_races=True))
    assert row_errors(actual, exact_prefill(case)).max() < TOLERANCE["fp8"]


def test_dense_kernel_equals_the_formula() -> None:
    queries, keys, values = dense_case(jnp.bfloat16, 1, 130, 150, (1, 1), 112)
    with compat.race_check():
        run = functools.partial(dense.dense_attention, causal=False, scale=112**-0.5, interpret=True)
        actual = jax.block_until_ready(run(queries, keys, values, None))
    expected = exact_dense(queries, keys, values, (150,), False)
    assert row_errors(actual.reshape(-1, 112), expected.reshape(-1, 112)).max() < 8e-3


@pytest.mark.kernels
def test_a_missing_wait_is_caught() -> None:
    """The loader no longer waits for a slot to be free. A hang also counts as caught (jax 0.10.2), a clean end does not."""
    code = """
        import sys
        import jax
        from jax.experimental.pallas import mosaic_gpu as plgpu
        from tests.kernels.test_mfa_prefill import interpret, make_case

        wait = plgpu.barrier_wait
        plgpu.barrier_wait = lambda barrier: None if sys._getframe(1).f_code.co_name == "_wait" else wait(barrier)
        case = make_case("bfloat16", heads=64, sequences=((1, 190),), padding=1)
        print("STARTED", flush=True)
        interpret(case, detect_races=True, slots=2)
        print("MISSED")
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        output, errors = done.stdout, done.stderr
    except subprocess.TimeoutExpired as hang:
        output, errors = (hang.stdout or b"").decode(), "a barrier never completes"
    assert "STARTED" in output, errors[-2000:]
    assert "MISSED" not in output
    assert "race" in errors.lower() or "barrier" in errors.lower(), errors[-2000:]


@pytest.mark.parametrize("storage", ["bfloat16", "fp8", "int4"])
@pytest.mark.parametrize("heads", [64, 8])
def test_kernel_lowers_for_cuda_at_the_released_sizes(storage: str, heads: int) -> None:
    pages = jax.eval_shape(lambda: empty_pages(4096, 256, storage))
    shapes = (
        jax.ShapeDtypeStruct((2048, heads, 256), jnp.bfloat16),
        CachedTokens(pages, jax.ShapeDtypeStruct((8, 1024), jnp.int32), jax.ShapeDtypeStruct((8,), jnp.int32)),
        jax.ShapeDtypeStruct((9,), jnp.int32),
    )
    assert "mosaic_gpu" in lower_for_cuda(functools.partial(mfa_prefill, implementation="mosaic"), *shapes)
    assert "mosaic_gpu" in lower_for_cuda(mfa_prefill, *shapes)


@pytest.mark.parametrize("tokens", [2708, 1300])
def test_dense_kernel_lowers_for_cuda_at_the_vision_towers_sizes(tokens: int) -> None:
    shape = jax.ShapeDtypeStruct((2, tokens, 16, 112), jnp.bfloat16)
    assert "mosaic_gpu" in lower_for_cuda(functools.partial(dense_attention, implementation="mosaic"), *[shape] * 3)


def test_what_the_kernel_cannot_serve_goes_to_the_reference_or_says_why() -> None:
    case = make_case("float32", sequences=((2, 3),))
    with pytest.raises(NotImplementedError, match="float32 cache"):
        mfa_prefill(*case, implementation="mosaic")
    assert bool(jnp.isfinite(mfa_prefill(*case).astype(jnp.float32)).all())
    with pytest.raises(NotImplementedError, match="8, 16, 32 or 64 heads, not 48"):
        mfa_prefill(*make_case("bfloat16", sequences=((2, 3),), heads=48), implementation="interpret")
    queries, keys, values = dense_case(jnp.float32, 1, 3, 3, (2, 2), 16)
    with pytest.raises(NotImplementedError, match="bfloat16 or float16"):
        dense_attention(queries, keys, values, implementation="mosaic")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda case: case._replace(queries=case.queries[..., :128]), "heads of 128, the cache has rows of 256"),
        (lambda case: case._replace(query_starts=case.query_starts[:-1]), "1 entries for 1 sequences; 2 are needed"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change: Callable[[Case], Case], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mfa_prefill(*change(make_case("bfloat16", sequences=((2, 3),))))


def test_heads_that_do_not_divide_are_refused() -> None:
    queries, keys, values = dense_case(jnp.float32, 1, 3, 3, (4, 3), 16)
    with pytest.raises(ValueError, match="3 key/value heads do not divide 4 query heads"):
        dense_attention(queries, keys, values)


@pytest.mark.kernels
@pytest.mark.parametrize("storage", ["bfloat16", "fp8", "int4"])
@pytest.mark.parametrize(("heads", "page_size"), [(64, 64), (32, 128), (16, 64), (8, 64)])
def test_kernel_equals_the_formula_at_every_edge_and_on_repetition(storage: str, heads: int, page_size: int) -> None:
    case = make_case(storage, heads=heads, page_size=page_size)
    actual = np.asarray(interpret(case))
    assert row_errors(actual, exact_prefill(case)).max() < TOLERANCE[storage]
    assert not actual[-2:].any()
    np.testing.assert_array_equal(actual, np.asarray(interpret(case, detect_races=True)))


@pytest.mark.kernels
@pytest.mark.parametrize("slots", [2, 3, 4])
def test_kernel_does_not_depend_on_the_ring(slots: int) -> None:
    sequences = ((2, 400), (1, 1), (3, 321))
    bfloat16, fp8 = (make_case(storage, sequences, heads=32) for storage in ("bfloat16", "fp8"))
    raw_slots = {"raw_slots": 2} if slots == 3 else {}
    options = {"slots": min(slots, 3), **raw_slots}
    assert row_errors(interpret(bfloat16, slots=slots), exact_prefill(bfloat16)).max() < TOLERANCE["bfloat16"]
    assert row_errors(interpret(fp8, detect_races=True, **options), exact_prefill(fp8)).max() < TOLERANCE["fp8"]


def test_an_fp8_ring_of_more_slots_than_its_scales_can_follow_is_refused() -> None:
    with pytest.raises(ValueError, match="fp8 cache takes 2 or 3 slots, not 4"):
        interpret(make_case("fp8", ((1, 1),), heads=32), slots=4)


@pytest.mark.kernels
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [None, (0, 130)])
@pytest.mark.parametrize(("heads", "head_dim"), [((2, 2), 112), ((2, 1), 256), ((1, 1), 48)])
def test_dense_kernel_equals_the_formula_in_all_forms(
    causal: bool, lengths: tuple[int, int] | None, heads: tuple[int, int], head_dim: int
) -> None:
    queries, keys, values = dense_case(jnp.bfloat16, 2, 150, 170, heads, head_dim)
    given = None
    if lengths is not None:
        keys, values = (array.at[1, 130:].set(jnp.nan) for array in (keys, values))
        given = jnp.array(lengths)
    with compat.race_check():
        run = functools.partial(dense.dense_attention, causal=causal, scale=head_dim**-0.5, interpret=True)
        actual = jax.block_until_ready(run(queries, keys, values, given, detect_races=True))
    expected = exact_dense(queries, keys, values, lengths or (170, 170), causal)
    assert row_errors(actual.reshape(-1, head_dim), expected.reshape(-1, head_dim)).max() < 8e-3
