"""RoPE on queries and keys, and the write of the new rows into the paged cache."""

from __future__ import annotations

import functools
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat
from pallas_kernels.pages import KVPages, decode_rows, empty_pages
from pallas_kernels.rope_cache_write import mosaic
from pallas_kernels.rope_cache_write.api import rope_cache_write
from step3_jax.layers.rope import apply_rope, rope_table
from tests.kernels.support import lower_for_cuda, row_errors

HEAD_DIM = 256
ROOT = pathlib.Path(__file__).resolve().parents[2]


def make_step(
    num_tokens: int, storage: str, *, num_heads: int = 64, head_dim: int = HEAD_DIM, num_pages: int = 6, seed: int = 0
) -> tuple[jax.Array, ...]:
    """Arguments with every place used once; some tokens are dropped, by page ids below and above the pages there are."""
    random = np.random.default_rng(seed)
    queries, keys, values = (
        jnp.asarray(random.standard_normal(shape), jnp.bfloat16)
        for shape in ((num_tokens, num_heads, head_dim), (num_tokens, head_dim), (num_tokens, head_dim))
    )
    if num_tokens:
        values = values.at[0].set(0)
    cos, sin = rope_table(jnp.asarray(random.integers(0, 65536, (1, num_tokens))), head_dim=head_dim, theta=5e5)
    places = random.permutation(num_pages * 64)[:num_tokens]
    ids = places // 64
    ids[2::5], ids[3::7] = -1, num_pages
    pages = jax.tree.map(lambda buffer: fill(random, buffer), empty_pages(num_pages, head_dim, storage))
    return (
        queries,
        keys,
        values,
        cos[0],
        sin[0],
        pages,
        jnp.asarray(ids, jnp.int32),
        jnp.asarray(places % 64, jnp.int32),
    )


def fill(random: np.random.Generator, buffer: jax.Array) -> jax.Array:
    """Bytes that the writes must leave alone."""
    if jnp.issubdtype(buffer.dtype, jnp.integer):
        return jnp.asarray(random.integers(0, 256, buffer.shape), buffer.dtype)
    return jnp.asarray(random.standard_normal(buffer.shape)).astype(buffer.dtype)


def rotate_exactly(rows: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """The formula in float64, [N, *heads, K]."""
    shape = (len(rows),) + (1,) * (rows.ndim - 2) + (-1,)
    first, second = np.split(rows, 2, axis=-1)
    cos, sin = cos.reshape(shape), sin.reshape(shape)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def check(step: tuple[jax.Array, ...], got: tuple[jax.Array, KVPages], tolerance: float) -> None:
    """Against float64: rotated queries, written rows; and that all other places are unchanged."""
    queries, keys, values, cos, sin, pages, ids, slots = (jax.tree.map(np.asarray, part) for part in step)
    wide = [array.astype(np.float64) for array in (queries, keys, values, cos, sin)]
    assert row_errors(got[0], rotate_exactly(wide[0], wide[3], wide[4])).max() < 5e-3
    kept = (ids >= 0) & (ids < len(pages.keys))
    ids, slots = ids[kept], slots[kept]
    for name, rows in (("key", rotate_exactly(wide[1], wide[3], wide[4])), ("value", wide[2])):
        old, new = getattr(pages, f"{name}s"), np.asarray(getattr(got[1], f"{name}s"))
        scales = getattr(got[1], f"{name}_scales")
        written_scales = None if scales is None else jnp.asarray(scales)[ids, :, slots]
        written = decode_rows(jnp.asarray(new)[ids, slots], written_scales, jnp.dtype(jnp.float32))
        assert row_errors(written, rows[kept]).max() < tolerance, name
        untouched = np.ones(new.shape[:2], bool)
        untouched[ids, slots] = False
        np.testing.assert_array_equal(new[untouched].view(np.uint8), old[untouched].view(np.uint8))
        if scales is not None:
            before, after = (
                np.swapaxes(np.asarray(array), 1, 2)[untouched] for array in (getattr(pages, f"{name}_scales"), scales)
            )
            np.testing.assert_array_equal(before.view(np.uint8), after.view(np.uint8))


TOLERANCE = {"float32": 5e-3, "bfloat16": 5e-3, "fp8": 5e-2, "int4": 0.2}


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "fp8", "int4"])
def test_reference_matches_float64_and_leaves_other_places_alone(storage: str) -> None:
    step = make_step(70, storage)
    check(step, jax.jit(functools.partial(rope_cache_write, implementation="reference"))(*step), TOLERANCE[storage])


def test_reference_is_the_models_rotation() -> None:
    queries, keys, _, cos, sin, *_ = step = make_step(9, "float32", num_heads=4, head_dim=64)
    rotated, pages = rope_cache_write(*step, implementation="reference")
    np.testing.assert_array_equal(rotated, apply_rope(queries[None], cos[None], sin[None])[0])
    wanted = apply_rope(keys[None], cos[None], sin[None])[0].astype(jnp.float32)
    ids, slots = step[6], step[7]
    kept = (ids >= 0) & (ids < pages.keys.shape[0])
    np.testing.assert_array_equal(pages.keys[ids[kept], slots[kept]], wanted[kept])


@pytest.mark.parametrize(("num_tokens", "storage"), [(3, "bfloat16"), (70, "fp8")])
def test_interpreted_kernel_matches_float64(num_tokens: int, storage: str) -> None:
    step = make_step(num_tokens, storage)
    check(step, rope_cache_write(*step, implementation="interpret"), TOLERANCE[storage])


@pytest.mark.parametrize(("num_tokens", "implementation"), [(9, "reference"), (66, "interpret")])
def test_keys_and_values_are_columns_of_joined_rows_and_queries_come_as_float16(
    num_tokens: int, implementation: str
) -> None:
    queries, keys, values, *rest = step = make_step(num_tokens, "fp8")
    joined = jnp.concatenate([jnp.full((num_tokens, 128), jnp.nan, jnp.bfloat16), keys, values], axis=1)
    columns = {"key_at": 128, "value_at": 128 + HEAD_DIM}
    got = rope_cache_write(
        queries, joined, joined, *rest, **columns, query_dtype=jnp.float16, implementation=implementation
    )
    assert got[0].dtype == jnp.float16
    check(step, got, TOLERANCE["fp8"])
    # Rounded once, to three bits more than bfloat16 has.
    exact = rotate_exactly(*(np.asarray(array).astype(np.float64) for array in (queries, *(rest[0], rest[1]))))
    exact_tables = [np.asarray(table.astype(jnp.bfloat16)).astype(np.float64) for table in rest[:2]]
    assert row_errors(got[0], rotate_exactly(np.asarray(queries).astype(np.float64), *exact_tables)).max() < 5e-4
    assert row_errors(got[0], exact).max() < 5e-3


@pytest.mark.parametrize(("num_tokens", "implementation"), [(70, "reference"), (3, "interpret")])
def test_a_layer_of_a_pool_is_written_and_no_other(num_tokens: int, implementation: str) -> None:
    whole = make_step(num_tokens, "fp8", num_pages=12)
    # Ids counted from the second layer's first page: negative ones are still dropped, now those in the first layer.
    ids = jnp.where(whole[6] < 0, -1, whole[6] - 6)
    got = rope_cache_write(*whole[:6], ids, whole[7], first_page=6, implementation=implementation)
    check((*whole[:6], jnp.where(ids < 0, -1, ids + 6), whole[7]), got, TOLERANCE["fp8"])


@pytest.mark.kernels
@pytest.mark.parametrize("storage", ["bfloat16", "fp8"])
@pytest.mark.parametrize("num_tokens", [1, 16, 17, 63, 64, 65, 128, 130])
def test_interpreted_kernel_matches_float64_at_every_edge(num_tokens: int, storage: str) -> None:
    step = make_step(num_tokens, storage, seed=num_tokens)
    got = rope_cache_write(*step, implementation="interpret")
    check(step, got, TOLERANCE[storage])
    again = rope_cache_write(*step, implementation="interpret")
    for first, second in zip(jax.tree.leaves(got), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(np.asarray(first).view(np.uint8), np.asarray(second).view(np.uint8))


@pytest.mark.kernels
def test_interpreted_kernel_takes_more_than_one_tile_of_heads() -> None:
    step = make_step(5, "bfloat16", num_heads=128)
    check(step, rope_cache_write(*step, implementation="interpret"), TOLERANCE["bfloat16"])


def test_no_tokens_change_nothing() -> None:
    step = make_step(0, "bfloat16")
    rotated, pages = rope_cache_write(*step, implementation="interpret")
    assert rotated.shape == (0, 64, HEAD_DIM)
    np.testing.assert_array_equal(np.asarray(pages.keys), np.asarray(step[5].keys))


def test_race_detector_finds_nothing() -> None:
    step = make_step(4, "fp8")
    with compat.race_check():
        check(step, mosaic.rope_cache_write(*step, interpret=True, detect_races=True), TOLERANCE["fp8"])


PLANTED = """
from jax.experimental.pallas import mosaic_gpu as plgpu
from tests.kernels.test_rope_cache_write import compat, make_step, mosaic

mosaic.plgpu.{name} = lambda *args: None
try:
    with compat.race_check():
        mosaic.rope_cache_write(*make_step(3, "bfloat16"), interpret=True, detect_races=True)[0].block_until_ready()
except Exception as error:
    print("CAUGHT", type(error).__name__)
"""


@pytest.mark.parametrize("name", ["barrier_wait"])
def test_race_detector_catches_a_missing_wait(name: str) -> None:
    # In a separate process: a barrier without a waiter can hang the interpreter.
    done = subprocess.run(
        [sys.executable, "-c", PLANTED.format(name=name)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )
    assert "CAUGHT" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("storage", ["bfloat16", "fp8"])
def test_kernel_lowers_for_cuda_at_the_models_shapes(storage: str) -> None:
    shapes = jax.eval_shape(lambda: make_shapes(128, storage, 4096))
    assert "mosaic_gpu" in lower_for_cuda(functools.partial(rope_cache_write, implementation="mosaic"), *shapes)
    # Keys and values after the low-rank query of a joined product.
    joined = jax.ShapeDtypeStruct((128, 2048 + 2 * HEAD_DIM), jnp.bfloat16)
    columns = {"key_at": 2048, "value_at": 2048 + HEAD_DIM, "query_dtype": jnp.float16}
    run = functools.partial(rope_cache_write, **columns, implementation="mosaic")
    assert "mosaic_gpu" in lower_for_cuda(run, shapes[0], joined, joined, *shapes[3:])


def test_auto_takes_the_kernel_for_cuda_and_not_for_what_it_cannot_serve() -> None:
    for storage, has_kernel in (("fp8", True), ("int4", False)):
        text = lower_for_cuda(rope_cache_write, *jax.eval_shape(functools.partial(make_shapes, 128, storage, 64)))
        assert ("mosaic_gpu" in text) is has_kernel, storage


def make_shapes(num_tokens: int, storage: str, num_pages: int) -> tuple[jax.Array, ...]:
    """Zeros of the real model's shapes, for `jax.eval_shape`."""
    return (
        jnp.zeros((num_tokens, 64, HEAD_DIM), jnp.bfloat16),
        jnp.zeros((num_tokens, HEAD_DIM), jnp.bfloat16),
        jnp.zeros((num_tokens, HEAD_DIM), jnp.bfloat16),
        jnp.zeros((num_tokens, HEAD_DIM // 2)),
        jnp.zeros((num_tokens, HEAD_DIM // 2)),
        empty_pages(num_pages, HEAD_DIM, storage),
        jnp.zeros((num_tokens,), jnp.int32),
        jnp.zeros((num_tokens,), jnp.int32),
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"storage": "int4"}, "int4"),
        ({"num_heads": 8}, "query heads"),
        ({"head_dim": 128}, "head size 256"),
    ],
)
def test_kernel_says_what_it_cannot_serve(change: dict[str, object], reason: str) -> None:
    step = make_step(2, **{"storage": "bfloat16", **change})
    with pytest.raises(NotImplementedError, match=reason):
        rope_cache_write(*step, implementation="mosaic")


def test_pages_of_another_head_size_are_refused() -> None:
    step = list(make_step(2, "bfloat16"))
    step[5] = empty_pages(6, 128, "bfloat16")
    with pytest.raises(ValueError, match="pages hold heads of 128"):
        rope_cache_write(*step)
