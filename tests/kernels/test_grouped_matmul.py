"""The routed experts: the reference against float64, the kernels in the interpreter against the reference."""

from __future__ import annotations

import functools
import inspect
import re
import subprocess
import sys
import textwrap
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.compat import race_check
from pallas_kernels.grouped_matmul import api, body, mosaic, reference
from pallas_kernels.moe_permute.reference import (
    Permutation,
    Tiles,
    permute_rows,
    permute_scales,
    permute_weights,
    plan_permutation,
)
from pallas_kernels.quantise import FP8, quantise_rows
from tests.kernels.support import lower_for_cuda, row_errors

# Step3: width, expert width, experts.
WIDTH, INNER, EXPERTS = 7168, 5120, 48
Pair = tuple[jax.Array, jax.Array]


class Layer(NamedTuple):
    """Weights of E experts: gate and up [E, F, D], down [E, D, F]; arrays or pairs of values and scales."""

    gate: jax.Array | Pair
    up: jax.Array | Pair
    down: jax.Array | Pair


def random_layer(num_experts: int, width: int, inner: int, dtype: jnp.dtype, *, seed: int = 0) -> Layer:
    """Weights whose blocks differ in size by up to 4, so that a wrong scale shows."""
    random = np.random.default_rng(seed)

    def stack(rows: int, columns: int) -> jax.Array | Pair:
        values = jnp.asarray(random.standard_normal((num_experts, rows, columns)), jnp.float32)
        if dtype != FP8:
            return (values * columns**-0.5).astype(dtype)
        scales = np.exp2(random.uniform(-1, 1, (num_experts, rows // 128, columns // 128))) * columns**-0.5
        return values.astype(FP8), jnp.asarray(scales, jnp.float32)

    return Layer(stack(inner, width), stack(inner, width), stack(width, inner))


def exact(stack: jax.Array | Pair) -> np.ndarray:
    """A stack in float64, dequantised."""
    if not isinstance(stack, tuple):
        return np.asarray(stack).astype(np.float64)
    values, scales = (np.asarray(array).astype(np.float64) for array in stack)
    return values * np.repeat(np.repeat(scales, 128, axis=-2), 128, axis=-1)


def exact_moe(x: jax.Array, weights: np.ndarray, experts: np.ndarray, layer: Layer, first: int = 0) -> np.ndarray:
    """The sum over the experts of the shard, pair by pair, in float64."""
    gate, up, down = (exact(stack) for stack in layer)
    out = np.zeros(x.shape)
    for token, row in enumerate(np.asarray(x).astype(np.float64)):
        for weight, expert in zip(weights[token], experts[token] - first, strict=True):
            if 0 <= expert < len(gate):
                gated = gate[expert] @ row
                out[token] += weight * (down[expert] @ (gated / (1 + np.exp(-gated)) * (up[expert] @ row)))
    return out


def random_tokens(num_tokens: int, num_experts: int, width: int, dtype: jnp.dtype) -> tuple:
    random = np.random.default_rng(1)
    x = jnp.asarray(random.standard_normal((num_tokens, width)), jnp.float32).astype(dtype)
    weights = random.uniform(0.1, 1, (num_tokens, 3)).astype(np.float32)
    experts = np.argsort(random.random((num_tokens, num_experts)), axis=1)[:, :3].astype(np.int32)
    return x, weights, experts


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2), (FP8, 6e-2)])
def test_the_reference_is_the_formula(dtype: jnp.dtype, tolerance: float) -> None:
    """With FP8 weights the activations are rounded to 3 bits of mantissa twice; the rest of the sum is exact."""
    layer = random_layer(6, 256, 128, jnp.dtype(dtype))
    x, weights, experts = random_tokens(20, 6, 256, jnp.float32 if dtype == jnp.float32 else jnp.bfloat16)
    experts[:, 0] = 4
    out = api.moe_ffn(x, jnp.asarray(weights), jnp.asarray(experts), *layer)
    assert out.dtype == x.dtype
    assert row_errors(out, exact_moe(x, weights, experts, layer)).max() < tolerance


def test_the_shards_of_the_experts_add_up_to_the_whole() -> None:
    layer = random_layer(6, 128, 128, jnp.dtype(jnp.float32))
    x, weights, experts = random_tokens(9, 8, 128, jnp.float32)
    run = functools.partial(api.moe_ffn, x, jnp.asarray(weights), jnp.asarray(experts))
    parts = [
        run(*(stack[first : first + 2] for stack in layer), first_expert=first, all_experts=8) for first in (0, 2, 4)
    ]
    np.testing.assert_allclose(sum(parts), run(*layer), rtol=1e-5, atol=1e-5)
    # Experts 6 and 7 are on no shard here: their pairs add nothing.
    assert row_errors(sum(parts), exact_moe(x, weights, experts, layer)).max() < 1e-5
    assert not np.asarray(run(*(stack[:2] for stack in layer), first_expert=100)).any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, FP8])
def test_a_traced_layer_of_a_stack_is_that_layer(dtype: jnp.dtype) -> None:
    layers = [random_layer(4, 128, 256, jnp.dtype(dtype), seed=seed) for seed in range(2)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    x, weights, experts = random_tokens(5, 4, 128, jnp.bfloat16)
    run = functools.partial(api.moe_ffn, x, jnp.asarray(weights), jnp.asarray(experts))
    stacked = jax.jit(lambda layer: run(*stack, layer=layer))
    for index, layer in enumerate(layers):
        np.testing.assert_array_equal(
            np.asarray(stacked(index), np.float32), np.asarray(jax.jit(run)(*layer), np.float32)
        )


def test_rows_that_are_quantised_already_give_the_same() -> None:
    layer = random_layer(4, 256, 128, jnp.dtype(FP8))
    x, weights, experts = random_tokens(7, 4, 256, jnp.bfloat16)
    run = functools.partial(jax.jit(api.moe_ffn), weights=jnp.asarray(weights), experts=jnp.asarray(experts))
    gate, up, down = layer
    expected = run(x, gate=gate, up=up, down=down)
    found = run(quantise_rows(x, scales_layout="columns"), gate=gate, up=up, down=down)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found.astype(jnp.float32), expected.astype(jnp.float32))
    with pytest.raises(ValueError, match="x is quantised but the weights are not"):
        api.moe_ffn(quantise_rows(x), jnp.asarray(weights), jnp.asarray(experts), gate[0], up[0], down[0])
    with pytest.raises(ValueError, match=r"the scales of x are \(7, 2\); for values \(7, 256\) they must be \(2, 8\)"):
        api.moe_ffn(quantise_rows(x), jnp.asarray(weights), jnp.asarray(experts), *layer)


class Batch(NamedTuple):
    """Rows of given lengths for each expert; rows without a pair, and experts without a row, are poisoned with NaN."""

    permutation: Permutation
    rows: jax.Array | Pair
    row_weights: jax.Array
    layer: Layer

    @property
    def is_used(self) -> np.ndarray:
        return np.asarray(self.permutation.pairs) < self.permutation.rows.size


def ragged_batch(lengths: list[int], tile_rows: int, dtype: jnp.dtype, width: int, inner: int) -> Batch:
    experts = np.repeat(np.arange(len(lengths)), lengths).astype(np.int32)
    random = np.random.default_rng(2)
    random.shuffle(experts)
    permutation = plan_permutation(
        jnp.asarray(experts)[:, None], num_experts=len(lengths), first_expert=0, tile_rows=tile_rows
    )
    x = jnp.asarray(random.standard_normal((len(experts), width)), jnp.float32).astype(jnp.bfloat16)
    is_used = np.asarray(permutation.pairs) < len(experts)

    def poison(array: jax.Array, is_good: np.ndarray, axis: int = 0) -> jax.Array:
        shape = [1] * array.ndim
        shape[axis] = -1
        return jnp.where(is_good.reshape(shape), array.astype(jnp.float32), jnp.nan).astype(array.dtype)

    if dtype == FP8:
        values, scales = quantise_rows(x)
        rows = (
            poison(permute_rows(values, permutation), is_used),
            poison(permute_scales(scales, permutation), is_used, 1),
        )
    else:
        rows = poison(permute_rows(x, permutation), is_used)
    row_weights = poison(
        permute_weights(jnp.asarray(random.random((len(experts), 1)), jnp.float32), permutation), is_used
    )
    layer = random_layer(len(lengths), width, inner, dtype)
    layer = jax.tree.map(lambda leaf: poison(leaf, np.array(lengths) > 0), layer)
    # Unused tiles point nowhere.
    table, used = permutation.tiles
    table = jnp.where(jnp.arange(len(table))[:, None] < used, table, 10**6)
    return Batch(permutation._replace(tiles=Tiles(table, used)), rows, row_weights, layer)


def check_kernels(batch: Batch, *, detect_races: bool = False, ctas: int = 3, stages: int = 3) -> None:
    """Both kernels in the interpreter against the reference, row by row."""
    tiles, is_used = batch.permutation.tiles, batch.is_used
    is_fp8 = isinstance(batch.rows, tuple)
    options = {
        "interpret": True,
        "detect_races": detect_races,
        "blocks": {"ctas": ctas, "stages": stages},
    }
    gate, up, down = batch.layer
    expected = reference.grouped_gate_up(batch.rows, gate, up, tiles, quantise=is_fp8)
    with race_check():
        inner = mosaic.grouped_gate_up(batch.rows, gate, up, tiles, quantise=is_fp8, **options)
        jax.block_until_ready(inner)
    if is_fp8:
        np.testing.assert_allclose(inner[1][:, is_used], expected[1][:, is_used], rtol=1e-5)
        values = [
            np.asarray(array, np.float32) * np.repeat(np.asarray(scales).T, 128, axis=1)
            for array, scales in (inner, expected)
        ]
    else:
        values = [np.asarray(array, np.float32) for array in (inner, expected)]
    # A different order of summation, and now and then a different neighbour in rounding.
    assert row_errors(values[0][is_used], values[1][is_used]).max() < 6e-3
    expected = reference.grouped_down(inner, down, batch.row_weights, tiles)
    with race_check():
        out = mosaic.grouped_down(inner, down, batch.row_weights, tiles, **options)
        out.block_until_ready()
    assert row_errors(np.asarray(out)[is_used], np.asarray(expected)[is_used]).max() < 3e-3


# An expert without rows, one row, part of a tile, a full one, one row more; and all rows with one expert.
RAGGED = {64: [0, 1, 65, 20, 0], 128: [129, 0, 40]}


def test_the_fp8_kernels_equal_the_reference_on_ragged_groups_without_a_race() -> None:
    """Two column groups, which meet for the scales; a ring shorter than the steps; several items for one CTA."""
    batch = ragged_batch(RAGGED[64], 64, jnp.dtype(FP8), 256, 128)
    check_kernels(batch, detect_races=True, ctas=2, stages=2)


@pytest.mark.kernels
def test_the_bfloat16_kernels_equal_the_reference_on_ragged_groups() -> None:
    """Two row groups; sums that stay in the accumulators."""
    check_kernels(ragged_batch(RAGGED[128], 128, jnp.dtype(jnp.bfloat16), 128, 128))


@pytest.mark.kernels
@pytest.mark.parametrize(("dtype", "tile_rows"), [(FP8, 128), (jnp.bfloat16, 64)])
def test_the_kernels_equal_the_reference_at_the_other_tiles(dtype: jnp.dtype, tile_rows: int) -> None:
    check_kernels(ragged_batch(RAGGED[tile_rows], tile_rows, jnp.dtype(dtype), 256, 128), detect_races=True)


@pytest.mark.kernels
@pytest.mark.parametrize("lengths", [[64, 0, 128, 17], [0, 0, 200], [33, 32, 31, 63], [1, 1, 1, 1]])
@pytest.mark.parametrize("tile_rows", [64, 128])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, FP8])
def test_the_kernels_in_every_case(dtype: jnp.dtype, tile_rows: int, lengths: list[int]) -> None:
    check_kernels(ragged_batch(lengths, tile_rows, jnp.dtype(dtype), 256, 384), detect_races=True, ctas=4, stages=4)


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [jnp.bfloat16, FP8])
def test_the_layer_in_the_interpreter_repeats_bit_by_bit(dtype: jnp.dtype) -> None:
    layer = random_layer(4, 256, 256, jnp.dtype(dtype))
    x, weights, experts = random_tokens(30, 6, 256, jnp.bfloat16)
    run = functools.partial(api.moe_ffn, x, jnp.asarray(weights), jnp.asarray(experts), *layer, first_expert=1)
    first, second = (np.asarray(run(implementation="interpret"), np.float32) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert row_errors(first, run(implementation="reference")).max() < 1e-2


@pytest.mark.parametrize(
    "dtype", [pytest.param(jnp.bfloat16, marks=pytest.mark.kernels), pytest.param(FP8, marks=pytest.mark.thorough)]
)
def test_a_layer_in_the_interpreter_equals_the_reference(dtype: jnp.dtype) -> None:
    """A shard of a stack of layers, from tokens to tokens; some tokens have no expert here."""
    layers = [random_layer(2, 128, 128, jnp.dtype(dtype), seed=seed) for seed in range(2)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    x, weights, experts = random_tokens(4, 6, 128, jnp.bfloat16)
    run = functools.partial(api.moe_ffn, x, jnp.asarray(weights), jnp.asarray(experts), *stack, first_expert=1, layer=1)
    expected = run(implementation="reference")
    assert row_errors(run(implementation="interpret"), expected).max() < 1e-2
    is_elsewhere = ((experts < 1) | (experts > 2)).all(axis=1)
    assert is_elsewhere.any()
    assert not np.asarray(expected, np.float32)[is_elsewhere].any()


PLANTED = """
    import inspect, sys, types
    import jax.numpy as jnp
    from pallas_kernels.grouped_matmul import body, mosaic
    from tests.kernels import test_grouped_matmul as tests

    source, old, new = inspect.getsource(body), {old!r}, {new!r}
    assert source.count(old) == 1
    bad = types.ModuleType("bad")
    # Dataclasses look their module up.
    sys.modules["bad"] = bad
    exec(compile(source.replace(old, new), "bad", "exec"), bad.__dict__)
    mosaic.run = bad.run
    tests.check_kernels(
        tests.ragged_batch([3, 1], 64, jnp.dtype(tests.FP8), 256, 128), detect_races=True, ctas=1, stages=2
    )
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        # The ring is overwritten before the products have read it.
        pytest.param("plgpu.barrier_wait(free.at[slot])", "pass", marks=pytest.mark.thorough),
        # The two halves of a row's scale are read before they are there.
        pytest.param("plgpu.barrier_wait(met)", "pass", marks=pytest.mark.kernels),
    ],
)
def test_a_missing_barrier_is_caught(old: str, new: str) -> None:
    assert inspect.getsource(body).count(old) == 1
    script = textwrap.dedent(PLANTED).format(old=old, new=new)
    try:
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        # A hang counts too: barriers out of step.
        return
    assert done.returncode != 0
    # The race detector, or the count of a barrier's phases.
    assert re.search("race between|observe", done.stderr), done.stderr[-2000:]


def shapes(dtype: jnp.dtype, *sizes: int) -> jax.ShapeDtypeStruct | tuple:
    """A stack of weights at sizes [..., rows, columns] without its values."""
    if dtype != FP8:
        return jax.ShapeDtypeStruct(sizes, dtype)
    scales = (*sizes[:-2], sizes[-2] // 128, sizes[-1] // 128)
    return jax.ShapeDtypeStruct(sizes, dtype), jax.ShapeDtypeStruct(scales, jnp.float32)


@pytest.mark.parametrize(
    ("dtype", "num_tokens", "num_experts", "lead"),
    [(jnp.bfloat16, 64, 48, ()), (jnp.bfloat16, 8192, 48, ()), (FP8, 1024, 6, (56,)), (FP8, 8192, 48, ())],
)
def test_the_layer_lowers_at_the_sizes_of_step3(
    dtype: jnp.dtype, num_tokens: int, num_experts: int, lead: tuple[int, ...]
) -> None:
    """Tiles of 64 and of 128 rows; one with a layer of a stack. Lowering checks shapes, layouts and shared memory."""

    def run(x: jax.Array, weights: jax.Array, experts: jax.Array, layer: Layer, index: jax.Array) -> jax.Array:
        return api.moe_ffn(
            x,
            weights,
            experts,
            *layer,
            all_experts=EXPERTS,
            layer=index if lead else None,
            implementation="mosaic",
        )

    wide, deep = (*lead, num_experts, INNER, WIDTH), (*lead, num_experts, WIDTH, INNER)
    layer = Layer(shapes(dtype, *wide), shapes(dtype, *wide), shapes(dtype, *deep))
    pairs = (num_tokens, 3)
    text = lower_for_cuda(
        run,
        jax.ShapeDtypeStruct((num_tokens, WIDTH), jnp.bfloat16),
        jax.ShapeDtypeStruct(pairs, jnp.float32),
        jax.ShapeDtypeStruct(pairs, jnp.int32),
        layer,
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    assert text.count("mosaic_gpu_v2") >= 3


def test_wrong_arguments_are_refused() -> None:
    layer = random_layer(2, 128, 256, jnp.dtype(jnp.bfloat16))
    quantised = random_layer(2, 128, 256, jnp.dtype(FP8))
    x, weights, experts = random_tokens(4, 4, 128, jnp.bfloat16)
    tokens = x, jnp.asarray(weights), jnp.asarray(experts)
    with pytest.raises(ValueError, match="pairs"):
        api.moe_ffn(*tokens, layer.gate, layer.up, quantised.down)
    with pytest.raises(ValueError, match="without `layer`"):
        api.moe_ffn(*tokens, *layer, layer=0)
    with pytest.raises(ValueError, match=r"gate and up must be \[E, F, D\]"):
        api.moe_ffn(*tokens, layer.gate, layer.down, layer.up)
    with pytest.raises(ValueError, match="must be equal"):
        api.moe_ffn(jnp.zeros((4, 256), jnp.bfloat16), *tokens[1:], *layer)
    with pytest.raises(ValueError, match="the scales of up"):
        api.moe_ffn(*tokens, quantised.gate, (quantised.up[0], quantised.up[1][:1]), quantised.down)
    with pytest.raises(ValueError, match="first_expert is -1"):
        api.moe_ffn(*tokens, *layer, first_expert=-1)
    permutation = plan_permutation(tokens[2], num_experts=2, first_expert=0, tile_rows=64)
    rows = jnp.zeros((permutation.pairs.shape[0], 128), jnp.bfloat16)
    with pytest.raises(ValueError, match="same permutation"):
        api.grouped_gate_up(rows[:-1], layer.gate, layer.up, permutation.tiles)
    with pytest.raises(ValueError, match="the weights are for 256"):
        api.grouped_down(rows, layer.down, jnp.zeros(len(rows)), permutation.tiles)
    with pytest.raises(NotImplementedError, match="rows in bfloat16 or e4m3"):
        api.moe_ffn(x.astype(jnp.float32), *tokens[1:], *layer, implementation="mosaic")
    small = plan_permutation(tokens[2], num_experts=2, first_expert=0, tile_rows=8)
    rows = jnp.zeros((small.pairs.shape[0], 128), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="64 or 128"):
        api.grouped_gate_up(rows, layer.gate, layer.up, small.tiles, implementation="interpret")


def test_no_tokens_give_no_rows() -> None:
    layer = random_layer(2, 128, 128, jnp.dtype(jnp.bfloat16))
    empty = jnp.zeros((0, 3))
    out = api.moe_ffn(jnp.zeros((0, 128), jnp.bfloat16), empty, empty.astype(jnp.int32), *layer)
    assert out.shape == (0, 128)
