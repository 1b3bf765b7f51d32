"""CPU kernels against the dequantised reference, in every instruction set that this processor has and a compiler serves."""

from __future__ import annotations

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.pages import CachedTokens, KVPages, empty_pages
from step3_jax.cpu_kernels import api
from step3_jax.cpu_kernels.build import NEEDED, InstructionSet, choose_instruction_set, read_cpu_flags
from step3_jax.cpu_kernels.loader import Kernels, load_kernels
from step3_jax.quant import BlockScaled, PackedInt4, dequantise, quantise

FORMS = ("float32", "bfloat16", "fp8", "int8", "int4")


# Those that the processor would not take are compiled for the test: seconds each.
BEST = choose_instruction_set(read_cpu_flags())
SETS = [pytest.param(name, marks=[] if name == BEST else pytest.mark.slow) for name in get_args(InstructionSet)]


@pytest.fixture(scope="module", params=SETS)
def kernels(request):
    if not NEEDED[request.param] <= read_cpu_flags():
        pytest.skip(f"this processor has no {request.param}")
    found = load_kernels(request.param)
    if not isinstance(found, Kernels):
        pytest.skip(found.reason)
    return found


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# Operation by operation each would be compiled by itself.
QUANTISE, DEQUANTISE = jax.jit(quantise, static_argnums=1), jax.jit(dequantise)


def hold(weight, form):
    return weight.astype(form) if form in ("float32", "bfloat16") else QUANTISE(weight, form)


def widen(weight):
    """The weight that counts, in float64."""
    plain = DEQUANTISE(weight) if isinstance(weight, BlockScaled | PackedInt4) else weight.astype(jnp.float32)
    return np.asarray(plain, np.float64)


def swiglu_of(x, gate, up, down):
    gated = x @ gate.T
    return (gated / (1 + np.exp(-gated)) * (x @ up.T)) @ down.T


def assert_close(actual, expected):
    assert np.abs(actual - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(("outputs", "inputs"), [(130, 1100), (3, 20)])
def test_products_agree_with_the_dequantised_reference(kernels, outputs, inputs):
    weight = normal(outputs, inputs, seed=1)
    weights = [hold(weight, form) for form in FORMS]
    wide = [widen(stored) for stored in weights]
    for rows in (1, 4, 7, 100):
        x = normal(rows, inputs)
        for out, expected in zip(api.products(kernels, x, weights), wide, strict=True):
            assert_close(out, np.asarray(x, np.float64) @ expected.T)


def test_every_byte_of_e4m3_is_exact(kernels):
    values = jnp.asarray(np.arange(256, dtype=np.uint8)).view(jnp.float8_e4m3fn)
    numbers = np.asarray(values.astype(jnp.float32))
    is_number = ~np.isnan(numbers)
    # One row a byte, so that no sum rounds.
    stored = BlockScaled(jnp.tile(values[:, None], (1, 32)), jnp.ones((2, 1)), (128, 128))
    (out,) = api.products(kernels, jnp.eye(1, 32), [stored])
    np.testing.assert_array_equal(out[0][is_number], numbers[is_number])


def test_an_output_depends_on_its_own_row_alone(kernels):
    x, weights = normal(50, 1300), [hold(normal(9, 1300, seed=1), form) for form in FORMS]
    whole = api.products(kernels, x, weights)
    for rows in (1, 6, 7, 13):
        for out, of_all in zip(api.products(kernels, x[:rows], weights), whole, strict=True):
            np.testing.assert_array_equal(out, of_all[:rows])


@pytest.mark.parametrize("count", [0, 1, 13, 30, 40])
def test_padding_is_not_computed_and_rows_before_it_are_as_without(kernels, count):
    x = normal(30, 90)
    gate, up, down = (hold(normal(*shape, seed=1), "fp8") for shape in ((70, 90), (70, 90), (90, 70)))
    stacks = [jax.tree.map(lambda leaf: leaf[None], weight) for weight in (gate, up, down)]
    routing = jnp.ones((30, 1)), jnp.zeros((30, 1), jnp.int32)
    calls = {
        "products": lambda x: api.products(kernels, x, [gate, up]),
        "swiglu": lambda x: [api.swiglu(kernels, x, gate, up, down)],
        "experts": lambda x: [api.experts(kernels, x, *routing, stacks, [gate, up, down])],
        "experts alone": lambda x: [api.experts(kernels, x, *routing, stacks)],
    }
    for call in calls.values():
        with api.filled_rows(jnp.int32(count), 30):
            found = call(x)
        for out, whole in zip(found, call(x), strict=True):
            np.testing.assert_array_equal(out[:count], whole[:count])
            assert not out[count:].any()
            assert whole.any()


def test_calls_of_other_sizes_have_no_padding(kernels):
    x, weight = normal(5, 90), normal(70, 90, seed=1)
    with api.filled_rows(jnp.int32(2), 30):
        (found,) = api.products(kernels, x, [weight])
    np.testing.assert_array_equal(found, api.products(kernels, x, [weight])[0])


def test_a_number_of_rows_is_needed(kernels):
    shape = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    for operation in ("products", "swiglu", "experts"):
        call = jax.ffi.ffi_call(kernels.target(operation), shape)
        with pytest.raises(jax.errors.JaxRuntimeError, match=rf"step3_{operation}: argument 1, \[1\], is not a number"):
            np.asarray(call(np.ones((2, 3), np.float32), np.ones(1, np.int32)))


# Stacks are quantised operation by operation, which compiles each for a second.
@pytest.mark.parametrize(
    "form", [form if form == "fp8" else pytest.param(form, marks=pytest.mark.slow) for form in FORMS]
)
def test_experts_agree_with_the_sum_over_pairs(kernels, form):
    tokens = 40
    gate, up, down = (
        hold(normal(*shape, seed=seed), form) for seed, shape in enumerate(((5, 70, 90), (5, 70, 90), (5, 90, 70)))
    )
    shared = [hold(normal(*shape, seed=seed), form) for seed, shape in enumerate(((33, 90), (33, 90), (90, 33)))]
    x, factors = normal(tokens, 90, seed=7), jnp.abs(normal(tokens, 2, seed=8))
    rng = np.random.default_rng(3)
    # Expert 5 is elsewhere.
    chosen = np.stack([rng.permutation(6)[:2] for _ in range(tokens)]).astype(np.int32)
    found = api.experts(kernels, x, factors, jnp.asarray(chosen), [gate, up, down], shared)
    wide = [widen(stack) for stack in (gate, up, down)]
    expected = swiglu_of(np.asarray(x, np.float64), *(widen(weight) for weight in shared))
    for token in range(tokens):
        for factor, expert in zip(np.asarray(factors[token]), chosen[token], strict=True):
            if expert < 5:
                expected[token] += factor * swiglu_of(
                    np.asarray(x[token], np.float64), *(stack[expert] for stack in wide)
                )
    assert_close(found, expected)
    alone = api.experts(kernels, x[:1], factors[:1], jnp.asarray(chosen[:1]), [gate, up, down], shared)
    np.testing.assert_array_equal(alone, found[:1])


def test_swiglu_agrees_and_keeps_the_dtype_of_activations(kernels):
    weights = [hold(normal(*shape, seed=seed), "fp8") for seed, shape in enumerate(((40, 50), (40, 50), (50, 40)))]
    x = normal(3, 50, seed=4)
    expected = swiglu_of(np.asarray(x, np.float64), *map(widen, weights))
    assert_close(api.swiglu(kernels, x, *weights), expected)
    half = api.swiglu(kernels, x.astype(jnp.bfloat16), *weights)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), expected, rtol=0.05, atol=0.05 * np.abs(expected).max())


def test_more_rows_than_a_group_holds(kernels):
    x, weights = normal(1100, 8), [normal(4, 8, seed=1), normal(4, 8, seed=2), normal(8, 4, seed=3)]
    assert_close(api.swiglu(kernels, x, *weights), swiglu_of(np.asarray(x, np.float64), *map(widen, weights)))


def test_compiled_programs_call_them_in_loops(kernels):
    weight = hold(normal(16, 16, seed=1) / 8, "int8")

    @jax.jit
    def repeat(x, weight):
        return jax.lax.fori_loop(0, 5, lambda _, x: api.products(kernels, x, [weight])[0], x)

    x = normal(2, 16)
    expected = np.asarray(x, np.float64) @ np.linalg.matrix_power(widen(weight).T, 5)
    assert_close(repeat(x, weight), expected)


def test_what_is_not_taken_is_said():
    assert (
        api.unsupported(quantise(jnp.ones((4, 4)), block=(2, 2)))
        == "the CPU kernels take blocks of (128, 128) or (1, 128), not (2, 2)"
    )
    assert "float16" in (api.unsupported(jnp.ones((2, 2), jnp.float16)) or "")
    assert all(api.unsupported(hold(jnp.ones((2, 2)), form)) is None for form in FORMS)


@pytest.fixture
def rounding(kernels):
    """Kernels that round activations to bfloat16 where they meet weights in bfloat16 or FP8."""
    if not kernels.has_bfloat16:
        pytest.skip(f"{kernels.instruction_set} has no products of bfloat16")
    return kernels.for_activations(jnp.bfloat16)


def as_met(x, form):
    """Activations as a weight of this form meets them in a bfloat16 model, in float64."""
    rounded = x.astype(jnp.bfloat16) if form in ("bfloat16", "fp8") else x
    return np.asarray(rounded.astype(jnp.float32), np.float64)


@pytest.mark.parametrize(("outputs", "inputs"), [(130, 1100), (3, 20)])
def test_products_in_bfloat16_agree_with_rounded_activations(rounding, outputs, inputs):
    weight = normal(outputs, inputs, seed=1)
    weights = [hold(weight, form) for form in FORMS]
    for rows in (1, 3, 5, 7, 13, 100):
        x = normal(rows, inputs)
        found = api.products(rounding, x, weights)
        for form, out, stored in zip(FORMS, found, weights, strict=True):
            assert_close(out, as_met(x, form) @ widen(stored).T)


def test_every_byte_of_e4m3_is_exact_in_bfloat16_and_nan_stays(rounding):
    values = jnp.asarray(np.arange(256, dtype=np.uint8)).view(jnp.float8_e4m3fn)
    stored = BlockScaled(jnp.tile(values[:, None], (1, 32)), jnp.ones((2, 1)), (128, 128))
    for rows in (1, 20):
        (out,) = api.products(rounding, jnp.eye(rows, 32), [stored])
        is_number = ~np.isnan(np.asarray(values.astype(jnp.float32)))
        np.testing.assert_array_equal(out[0][is_number], values.astype(jnp.float32)[is_number])
        assert np.isnan(np.asarray(out[0])[~is_number]).all()


def test_an_output_in_bfloat16_depends_on_its_own_row_alone(rounding):
    x, weights = normal(50, 1300), [hold(normal(9, 1300, seed=1), form) for form in FORMS]
    whole = api.products(rounding, x, weights)
    for rows in (1, 3, 4, 6, 7, 13):
        for out, of_all in zip(api.products(rounding, x[:rows], weights), whole, strict=True):
            np.testing.assert_array_equal(out, of_all[:rows])


# Mixed forms: what is rounded stands beside what is not, in the inner activations too.
@pytest.mark.parametrize(
    "forms", [("fp8", "fp8", "fp8"), ("bfloat16", "float32", "fp8"), ("fp8", "bfloat16", "float32")]
)
def test_swiglu_in_bfloat16_agrees_with_rounded_activations(rounding, forms):
    shapes = (40, 150), (40, 150), (150, 40)
    weights = [
        hold(normal(*shape, seed=seed), form) for seed, (shape, form) in enumerate(zip(shapes, forms, strict=True))
    ]
    x = normal(9, 150, seed=4)
    gate, up = (as_met(x, form) @ widen(weight).T for form, weight in zip(forms[:2], weights, strict=False))
    inner = jnp.asarray(gate / (1 + np.exp(-gate)) * up, jnp.float32)
    expected = as_met(inner, forms[2]) @ widen(weights[2]).T
    # An inner activation that lies between two bfloat16 numbers may be rounded to either.
    assert np.abs(api.swiglu(rounding, x, *weights) - expected).max() <= 2**-9 * np.abs(expected).max()


def test_experts_in_bfloat16_are_their_swiglus(rounding):
    stacks = [
        hold(normal(*shape, seed=seed), "fp8") for seed, shape in enumerate(((3, 40, 50), (3, 40, 50), (3, 50, 40)))
    ]
    x, factors = normal(7, 50, seed=4), jnp.ones((7, 1))
    chosen = jnp.asarray([[0], [2], [2], [1], [0], [2], [2]], jnp.int32)
    found = api.experts(rounding, x, factors, chosen, stacks)
    for token, expert in enumerate(chosen[:, 0].tolist()):
        own = [jax.tree.map(lambda leaf, expert=expert: leaf[expert], stack) for stack in stacks]
        np.testing.assert_array_equal(found[token], api.swiglu(rounding, x[token : token + 1], *own)[0])


def call_experts(kernels, **changes):
    """A mixture of three experts in FP8 as the kernel gets it, some arrays of other shapes."""
    shapes = {"gate": (3, 40, 50), "up": (3, 40, 50), "down": (3, 50, 40)} | changes
    weights = []
    for shape in shapes.values():
        values, scales = (shape, (*shape[:-2], 1, 1)) if isinstance(shape[0], int) else shape
        weights += [np.zeros(values, jnp.float8_e4m3fn), np.ones(scales, np.float32)]
    call = jax.ffi.ffi_call(kernels.target("experts"), jax.ShapeDtypeStruct((1, 50), jnp.float32))
    routing = np.ones((1, 1), np.float32), np.full((1, 1), 2, np.int32)
    return np.asarray(call(np.ones((1, 50), np.float32), np.int32(1), *routing, *weights))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"up": (2, 40, 50)}, r"argument 6, \[2, 40, 50\], has not as many matrices as the other weights"),
        ({"down": (2, 50, 40)}, r"argument 8, \[2, 50, 40\], has not as many matrices"),
        ({"up": (40, 50)}, r"argument 6, \[40, 50\], has not as many matrices"),
        ({"up": (3, 39, 50)}, r"argument 6, \[3, 39, 50\], has not as many rows as the gate"),
        ({"down": (3, 50, 30)}, r"argument 8, \[3, 50, 30\], has not as many columns as what it is multiplied with"),
        ({"down": (3, 49, 40)}, r"argument 8, \[3, 49, 40\], has not as many rows as the activations have columns"),
        (
            {"up": ((3, 40, 50), (2, 1, 1))},
            r"argument 7, \[2, 1, 1\], is not the scales, in float32, of as many matrices",
        ),
        ({"up": ((3, 40, 50), (3, 2, 1))}, r"argument 7, \[3, 2, 1\], has not a scale for each block"),
        ({"up": ((3, 40, 50), (3, 1, 2))}, r"argument 7, \[3, 1, 2\], has not a scale for each block"),
    ],
)
def test_weights_that_do_not_fit_each_other_are_refused_and_not_read(kernels, changes, problem):
    assert not call_experts(kernels).any()
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"step3_experts: {problem}"):
        call_experts(kernels, **changes)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float8_e4m3fn, jnp.int8, jnp.uint8])
def test_rows_are_taken_as_they_are_stored(kernels, dtype):
    table = jnp.arange(60).reshape(10, 6).astype(dtype)
    found = api.rows(kernels, table, jnp.asarray([3, -1, 0, 9, 12]))
    assert found.dtype == dtype
    np.testing.assert_array_equal(found.astype(jnp.float32), table[jnp.asarray([3, 0, 0, 9, 9])].astype(jnp.float32))


@pytest.mark.parametrize(
    ("table", "ids", "argument"),
    [
        (jnp.zeros((2, 3), jnp.int16), jnp.zeros(1, jnp.int32), "argument 0, \\[2, 3\\], is not a table"),
        (jnp.zeros((0, 3)), jnp.zeros(1, jnp.int32), "argument 0, \\[0, 3\\], is not a table"),
    ],
)
def test_rows_of_what_is_not_a_table_are_refused(kernels, table, ids, argument):
    with pytest.raises(Exception, match=argument):
        jax.block_until_ready(api.rows(kernels, table, ids))


PAGE, HEAD_DIM, FIRST_PAGE = 64, 96, 2


def make_cache(lengths, dtype):
    """Sequences in pages of a pool in any order; NaN where none has a token, entries of the table that lead nowhere."""
    rng = np.random.default_rng(4)
    counts = [-(-length // PAGE) for length in lengths]
    order = rng.permutation(sum(counts)).astype(np.int32)
    table = np.full((len(lengths), max(counts) + 1), 10**6, np.int32)
    stored = np.full((2, FIRST_PAGE + sum(counts), PAGE, HEAD_DIM), np.nan, np.float32)
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        table[row, :count] = order[sum(counts[:row]) :][:count]
        for place in range(length):
            page = FIRST_PAGE + table[row, place // PAGE]
            stored[:, page, place % PAGE] = rng.normal(size=(2, HEAD_DIM))
    keys, values = jnp.asarray(stored).astype(jnp.bfloat16 if dtype == jnp.int16 else dtype)
    if dtype == jnp.int16:
        keys, values = keys.view(dtype), values.view(dtype)
    return CachedTokens(KVPages(keys, values), jnp.asarray(table), jnp.asarray(lengths, jnp.int32), FIRST_PAGE)


def attention_of(queries, cached):
    """In float64, token by token."""
    keys, values = (
        np.asarray((array.view(jnp.bfloat16) if array.dtype == jnp.int16 else array).astype(jnp.float32), np.float64)
        for array in (cached.pages.keys, cached.pages.values)
    )
    out = np.zeros(queries.shape)
    for row, length in enumerate(np.asarray(cached.lengths)):
        pages = FIRST_PAGE + np.asarray(cached.table[row, : -(-length // PAGE)])
        own_keys, own_values = (array[pages].reshape(-1, HEAD_DIM) for array in (keys, values))
        for token in range(queries.shape[1]):
            end = length - queries.shape[1] + 1 + token
            if end > 0:
                scores = np.asarray(queries[row, token], np.float64) @ own_keys[:end].T * HEAD_DIM**-0.5
                weights = np.exp(scores - scores.max(axis=1, keepdims=True))
                out[row, token] = weights @ own_values[:end] / weights.sum(axis=1, keepdims=True)
    return out


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int16])
@pytest.mark.parametrize(("tokens", "heads"), [(1, 16), (3, 5)])
def test_attention_over_pages_agrees_with_a_plain_softmax(kernels, dtype, tokens, heads):
    cached = make_cache([0, 1, 64, 70, 200], dtype)
    assert api.attends(cached.pages)
    # Scores of up to 60, whose exponentials differ by more than float32 holds.
    queries = 8 * normal(5, tokens, heads, HEAD_DIM, seed=2)
    expected = attention_of(queries, cached)
    assert_close(api.attend(kernels, queries, cached), expected)
    assert not expected[0].any()
    half = api.attend(kernels, queries.astype(jnp.bfloat16), cached)
    assert half.dtype == jnp.bfloat16


def test_attention_of_a_token_does_not_depend_on_the_others_of_the_call(kernels):
    lengths = [130, 67, 200]
    cached, queries = make_cache(lengths, jnp.float32), normal(3, 4, 19, HEAD_DIM, seed=2)
    whole = np.asarray(api.attend(kernels, queries, cached))
    for row, length in enumerate(lengths):
        own = cached._replace(table=cached.table[row : row + 1], lengths=jnp.asarray([length], jnp.int32))
        np.testing.assert_array_equal(api.attend(kernels, queries[row : row + 1], own)[0], whole[row])
        for token in range(4):
            seen = own._replace(lengths=jnp.asarray([length - 3 + token], jnp.int32))
            alone = api.attend(kernels, queries[row : row + 1, token : token + 1, token:], seen)
            np.testing.assert_array_equal(alone[0, 0], whole[row, token, token:])


def test_a_table_too_small_for_a_sequence_leaves_its_last_tokens_out(kernels):
    cached, queries = make_cache([200], jnp.float32), normal(1, 1, 2, HEAD_DIM)
    short = cached._replace(table=cached.table[:, :2])
    same = short._replace(lengths=jnp.asarray([2 * PAGE], jnp.int32))
    np.testing.assert_array_equal(api.attend(kernels, queries, short), api.attend(kernels, queries, same))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"queries": (1, 1, 2, 40)}, "argument 0, .*K a multiple of 32"),
        ({"keys": (3, 64, 64)}, r"argument 1, \[3, 64, 64\], is not pages"),
        ({"values": (3, 32, 32)}, r"argument 2, \[3, 32, 32\], is not as the keys are"),
        ({"table": (2, 3)}, r"argument 3, \[2, 3\], is not a table of pages"),
        ({"lengths": (2,)}, r"argument 4, \[2\], is not lengths"),
        ({"first_page": (1,)}, r"argument 5, \[1\], is not an int32"),
    ],
)
def test_attention_over_arrays_that_do_not_fit_is_refused(kernels, changes, problem):
    floats = {"queries": (1, 1, 2, 32), "keys": (3, 64, 32), "values": (3, 64, 32)}
    numbers = {"table": (1, 3), "lengths": (1,), "first_page": ()}
    shapes = floats | numbers | changes
    given = [np.zeros(shape, np.float32 if name in floats else np.int32) for name, shape in shapes.items()]
    call = jax.ffi.ffi_call(kernels.target("attend"), jax.ShapeDtypeStruct(shapes["queries"], jnp.float32))
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"step3_attend: {problem}"):
        np.asarray(call(*given))


def test_pages_that_attention_does_not_take():
    for storage in ("float32", "bfloat16"):
        assert api.attends(empty_pages(2, 64, storage))
        assert api.attends(empty_pages(2, 64, storage, as_bits=True))
        assert not api.attends(empty_pages(2, 48, storage))
    assert not any(api.attends(empty_pages(2, 64, storage, as_bits=True)) for storage in ("fp8", "int4"))
