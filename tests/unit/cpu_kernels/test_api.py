"""CPU kernels against the dequantised reference, in every instruction set that this processor has and a compiler serves."""

from __future__ import annotations

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


def hold(weight, form):
    return weight.astype(form) if form in ("float32", "bfloat16") else quantise(weight, form)


def widen(weight):
    """The weight that counts, in float64."""
    plain = dequantise(weight) if isinstance(weight, BlockScaled | PackedInt4) else weight.astype(jnp.float32)
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
