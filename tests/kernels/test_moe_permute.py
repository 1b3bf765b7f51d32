"""Order of the rows of a mixture of experts: the tables against plain numpy, the gather in the interpreter."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.compat import race_check
from pallas_kernels.moe_permute import api, mosaic, plan, reference
from pallas_kernels.moe_permute.reference import MAX_BUNDLE, Permutation, max_tiles
from pallas_kernels.quantise import FP8, quantise_rows, scales_to_columns
from tests.kernels.support import lower_for_cuda


def skewed_experts(num_tokens: int, top_k: int, num_experts: int, seed: int = 0) -> np.ndarray:
    """Distinct experts for each token, small ids far more often."""
    random = np.random.default_rng(seed)
    keys = random.gumbel(size=(num_tokens, num_experts)) - 0.3 * np.arange(num_experts)
    return np.argsort(-keys, axis=1)[:, :top_k].astype(np.int32)


CASES = {
    "one token": (np.array([[7, 0, 3]]), 8, 0, 64),
    "decode": (skewed_experts(20, 3, 8), 8, 0, 16),
    "a shard": (skewed_experts(40, 3, 12), 4, 2, 8),
    "nothing for this shard": (skewed_experts(40, 3, 12), 4, 12, 8),
    "all tokens to one expert": (np.full((300, 1), 5), 8, 0, 16),
    "ranks across chunks": (skewed_experts(300, 3, 6), 6, 0, 64),
    "a tile filled exactly, and one row more": (np.repeat([0, 1, 3], [64, 65, 1])[:, None], 5, 0, 64),
}


@pytest.mark.parametrize("name", CASES)
def test_every_pair_gets_a_row_of_its_expert_in_the_order_of_tokens(name: str) -> None:
    experts, num_experts, first, tile_rows = CASES[name]
    make = functools.partial(api.plan_permutation, num_experts=num_experts, first_expert=first, tile_rows=tile_rows)
    permutation = jax.jit(make)(jnp.asarray(experts, jnp.int32))
    assert permutation.tile_rows == tile_rows
    pairs, rows = np.asarray(permutation.pairs), np.asarray(permutation.rows).reshape(-1)
    table, used = np.asarray(permutation.tiles.table), int(permutation.tiles.used[0])
    flat = experts.reshape(-1)
    is_here = (flat >= first) & (flat < first + num_experts)
    assert (rows[~is_here] == len(pairs)).all()
    expected = np.full(len(pairs), flat.size)
    tile = 0
    for expert in range(num_experts):
        mine = np.flatnonzero(flat == first + expert)
        count = -(-len(mine) // tile_rows)
        for index in range(count):
            part = mine[index * tile_rows : (index + 1) * tile_rows]
            start = (tile + index) * tile_rows
            expected[start : start + len(part)] = part
            bundle = index // MAX_BUNDLE * MAX_BUNDLE
            size = min(MAX_BUNDLE, count - bundle)
            assert table[tile + index].tolist() == [expert, tile + bundle, size, len(part)]
        tile += count
    assert used == tile <= len(table) == max_tiles(flat.size, num_experts, tile_rows)
    np.testing.assert_array_equal(pairs, expected)
    np.testing.assert_array_equal(pairs[rows[is_here]], np.flatnonzero(is_here))
    assert (table[used:, 3] == 0).all()


def check_plan(name: str) -> None:
    """The kernel against the reference wherever that defines a row or a tile."""
    experts, num_experts, first, tile_rows = CASES[name]
    weights = jnp.asarray(np.random.default_rng(0).random(experts.shape), jnp.float32)
    options = {"num_experts": num_experts, "first_expert": first, "tile_rows": tile_rows}
    given = jnp.asarray(experts, jnp.int32)
    assert plan.unsupported(experts.size, num_experts, tile_rows) is None
    with race_check():
        run = functools.partial(plan.plan_permutation, **options, interpret=True, detect_races=True)
        permutation, row_weights = jax.block_until_ready(jax.jit(run)(given, weights, jnp.int32(10)))
    expected = reference.plan_permutation(given, **options)
    np.testing.assert_array_equal(permutation.rows, expected.rows)
    np.testing.assert_array_equal(permutation.tiles.used, expected.tiles.used)
    used = int(expected.tiles.used[0])
    tiles = reference.point_at(expected.tiles, 10 * num_experts)
    np.testing.assert_array_equal(permutation.tiles.table[:used], tiles.table[:used])
    is_used = np.asarray(expected.pairs) < experts.size
    np.testing.assert_array_equal(np.asarray(permutation.pairs)[is_used], np.asarray(expected.pairs)[is_used])
    wanted = np.asarray(reference.permute_weights(weights, expected))
    np.testing.assert_array_equal(np.asarray(row_weights)[is_used], wanted[is_used])
    assert permutation.pairs.shape == row_weights.shape == expected.pairs.shape
    assert permutation.tiles.table.shape == expected.tiles.table.shape


@pytest.mark.parametrize("name", ["a shard", "one token"])
def test_the_planning_kernel_gives_the_references_rows(name: str) -> None:
    check_plan(name)


@pytest.mark.kernels
@pytest.mark.parametrize("name", CASES)
def test_the_planning_kernel_in_every_case(name: str) -> None:
    check_plan(name)


@pytest.mark.parametrize(("num_tokens", "num_experts", "tile_rows"), [(1024, 6, 64), (128, 48, 64), (4096, 48, 128)])
def test_the_planning_kernel_lowers_for_steps_and_chunks(num_tokens: int, num_experts: int, tile_rows: int) -> None:
    run = functools.partial(
        plan.plan_permutation, num_experts=num_experts, first_expert=0, tile_rows=tile_rows, interpret=False
    )
    pairs = (num_tokens, 3)
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in ((pairs, jnp.int32), (pairs, jnp.float32), ((), jnp.int32))
    ]
    assert "moe_plan" in lower_for_cuda(run, *shapes)


def test_more_than_the_planning_kernel_holds_is_left_to_the_reference() -> None:
    assert "16384 pairs of 64 experts" in str(plan.unsupported(16_385, 8, 64))
    assert "16384 pairs of 64 experts" in str(plan.unsupported(10, 65, 64))
    assert "power of two" in str(plan.unsupported(10, 8, 96))


def test_rows_go_out_and_come_back_weighted() -> None:
    experts = skewed_experts(40, 3, 12)
    permutation = api.plan_permutation(jnp.asarray(experts), num_experts=4, first_expert=2, tile_rows=8)
    random = np.random.default_rng(1)
    array = random.standard_normal((40, 24)).astype(np.float32)
    weights = random.random((40, 3)).astype(np.float32)
    rows = api.permute_rows(jnp.asarray(array), permutation, implementation="reference")
    row_weights = api.permute_weights(jnp.asarray(weights), permutation)
    # The content of rows without a pair must not matter.
    is_used = np.asarray(permutation.pairs) < experts.size
    rows = jnp.where(is_used[:, None], rows * row_weights[:, None], jnp.nan)
    back = api.combine_rows(rows, permutation)
    share = np.where((experts >= 2) & (experts < 6), weights, 0).sum(axis=1, dtype=np.float64)
    np.testing.assert_allclose(back, array * share[:, None], rtol=1e-6)
    assert (np.asarray(row_weights)[~is_used] == 0).all()
    assert (np.asarray(back)[share == 0] == 0).all()
    assert api.combine_rows(rows, permutation, dtype=jnp.bfloat16).dtype == jnp.bfloat16


def test_scales_follow_their_rows() -> None:
    permutation = api.plan_permutation(jnp.asarray(skewed_experts(20, 3, 8)), num_experts=8, tile_rows=16)
    array = jnp.asarray(np.random.default_rng(2).standard_normal((20, 256)), jnp.float32)
    scales = api.permute_scales(quantise_rows(array)[1], permutation)
    rows = api.permute_rows(array, permutation, implementation="reference")
    # Rows without a pair are zeros, whose scale is 1.
    np.testing.assert_array_equal(scales, scales_to_columns(quantise_rows(rows)[1]))


def test_scales_that_are_columns_follow_their_rows_too() -> None:
    permutation = api.plan_permutation(jnp.asarray(skewed_experts(19, 3, 8)), num_experts=8, tile_rows=16)
    array = jnp.asarray(np.random.default_rng(2).standard_normal((19, 256)), jnp.float32)
    by_column = quantise_rows(array, scales_layout="columns")[1]
    expected = api.permute_scales(quantise_rows(array)[1], permutation)
    np.testing.assert_array_equal(reference.permute_columns(by_column, permutation), expected)


def check_gather(experts: np.ndarray, num_experts: int, tile_rows: int, dtype: jnp.dtype, blocks: dict) -> None:
    permutation = api.plan_permutation(jnp.asarray(experts), num_experts=num_experts, tile_rows=tile_rows)
    array = jax.random.normal(jax.random.key(0), (len(experts), 256)).astype(dtype)
    with race_check():
        rows = mosaic.permute_rows(array, permutation, interpret=True, detect_races=True, blocks=blocks)
        rows.block_until_ready()
    is_used = np.asarray(permutation.pairs) < experts.size
    expected = api.permute_rows(array, permutation, implementation="reference")
    np.testing.assert_array_equal(np.asarray(rows, np.float32)[is_used], np.asarray(expected, np.float32)[is_used])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, FP8])
def test_the_gather_kernel_equals_the_reference_and_has_no_race(dtype: jnp.dtype) -> None:
    check_gather(skewed_experts(20, 3, 8), 6, 16, jnp.dtype(dtype), {"rows": 8, "ctas": 3})


@pytest.mark.kernels
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, FP8])
def test_the_gather_kernel_in_every_case(name: str, dtype: jnp.dtype) -> None:
    experts, num_experts, _, tile_rows = CASES[name]
    check_gather(experts.astype(np.int32), num_experts, tile_rows, jnp.dtype(dtype), {"rows": 4, "ctas": 5})


@pytest.mark.parametrize("dtype", [jnp.bfloat16, FP8])
def test_the_gather_kernel_lowers_at_the_width_of_step3(dtype: jnp.dtype) -> None:
    def run(array: jax.Array, permutation: Permutation) -> jax.Array:
        return mosaic.permute_rows(array, permutation, interpret=False)

    make = functools.partial(api.plan_permutation, num_experts=48, tile_rows=128)
    permutation = jax.eval_shape(make, jax.ShapeDtypeStruct((1024, 3), jnp.int32))
    assert "mosaic_gpu" in lower_for_cuda(run, jax.ShapeDtypeStruct((1024, 7168), dtype), permutation)


def test_wrong_arguments_are_refused() -> None:
    experts = jnp.zeros((4, 3), jnp.int32)
    with pytest.raises(ValueError, match="num_experts 0"):
        api.plan_permutation(experts, num_experts=0)
    with pytest.raises(ValueError, match="at least 1"):
        api.plan_permutation(experts[:0], num_experts=2)
    permutation = api.plan_permutation(experts, num_experts=2, tile_rows=16)
    with pytest.raises(ValueError, match="same tokens"):
        api.permute_rows(jnp.zeros((5, 128)), permutation)
    with pytest.raises(ValueError, match="the permutation has 32"):
        api.combine_rows(jnp.zeros((5, 128)), permutation)
    with pytest.raises(ValueError, match="for pairs"):
        api.permute_weights(jnp.zeros((4, 2)), permutation)
    with pytest.raises(ValueError, match="for 5 tokens"):
        api.permute_scales(jnp.zeros((5, 2)), permutation)
    with pytest.raises(NotImplementedError, match="multiple of 128 columns"):
        api.permute_rows(jnp.zeros((4, 100)), permutation, implementation="interpret")
