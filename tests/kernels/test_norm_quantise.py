"""RMSNorm with FP8: the reference against the model's norm, the kernel in the interpreter against the reference."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.compat import race_check
from pallas_kernels.norm_quantise import mosaic, norm_quantise
from pallas_kernels.quantise import ScalesLayout, quantise_rows
from step3_jax.layers.norm import rms_norm
from tests.kernels.support import lower_for_cuda, row_errors

EPS = 1e-5


def inputs(m: int, size: int, dtype: jax.typing.DTypeLike, weight_dtype: jax.typing.DTypeLike) -> tuple[jax.Array, ...]:
    """Rows of very different sizes, one of zeros; a weight with a block of zeros."""
    random = np.random.default_rng(m)
    x = random.standard_normal((m, size)) * 10.0 ** random.integers(-4, 4, (m, 1))
    x[m // 2] = 0
    weight = random.standard_normal(size)
    weight[128:256] = 0
    return jnp.asarray(x, dtype), jnp.asarray(weight, weight_dtype)


def assert_same(actual: tuple[jax.Array, ...], expected: tuple[jax.Array, ...], m: int, layout: ScalesLayout) -> None:
    """Equal but for values that a different order of rounding put on the neighbouring FP8 number."""
    actual_scales, expected_scales = (
        scales if layout == "rows" else scales[:, :m] for scales in (actual[1], expected[1])
    )
    np.testing.assert_allclose(actual_scales, expected_scales, rtol=1e-5)
    values, wanted = (np.asarray(arrays[0].astype(jnp.float32)) for arrays in (actual, expected))
    assert (np.abs(values - wanted) <= np.maximum(np.abs(wanted) / 8, 2**-9)).all()
    assert (values == wanted).mean() > 0.999


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_reference_is_the_models_norm_then_quantised(dtype: jax.typing.DTypeLike) -> None:
    x, weight = inputs(5, 300, dtype, dtype)
    values, scales, normed = norm_quantise(x, weight, eps=EPS, with_normed=True)
    expected = rms_norm(x, weight, eps=EPS)
    np.testing.assert_array_equal(normed.astype(jnp.float32), expected.astype(jnp.float32))
    assert normed.dtype == dtype
    wanted_values, wanted_scales = quantise_rows(expected)
    np.testing.assert_array_equal(values.astype(jnp.float32), wanted_values.astype(jnp.float32))
    np.testing.assert_array_equal(scales, wanted_scales)


def test_the_reference_is_the_formula_in_float64() -> None:
    x, weight = inputs(4, 256, jnp.float32, jnp.float32)
    normed = norm_quantise(x, weight, eps=EPS, with_normed=True)[2]
    wide = np.asarray(x).astype(np.float64)
    exact = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + EPS) * np.asarray(weight).astype(np.float64)
    assert row_errors(normed, exact).max() < 1e-6


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_the_reference_takes_a_layer_of_a_stack(layout: ScalesLayout) -> None:
    x, weight = inputs(3, 256, jnp.bfloat16, jnp.bfloat16)
    stack = jnp.stack([weight + 1, weight, weight - 1])
    for actual, expected in zip(
        norm_quantise(x, stack, eps=EPS, scales_layout=layout, layer=1),
        norm_quantise(x, weight, eps=EPS, scales_layout=layout),
        strict=True,
    ):
        np.testing.assert_array_equal(actual.astype(jnp.float32), expected.astype(jnp.float32))


def test_columns_behind_the_norms_own_are_left_out() -> None:
    x, weight = inputs(3, 1024, jnp.bfloat16, jnp.bfloat16)
    wide = jnp.concatenate([x, jnp.full((3, 512), jnp.nan, jnp.bfloat16)], axis=1)
    expected = norm_quantise(x, weight, eps=EPS, implementation="reference")
    for implementation in ("reference", "interpret"):
        assert_same(norm_quantise(wide, weight, eps=EPS, implementation=implementation), expected, 3, "rows")
    with pytest.raises(NotImplementedError, match="multiple of 512 columns, but they have 1152"):
        norm_quantise(wide[:, :1152], weight, eps=EPS, implementation="interpret")


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_the_kernel_gives_what_the_reference_gives(layout: ScalesLayout) -> None:
    x, weight = inputs(3, 1024, jnp.bfloat16, jnp.bfloat16)
    options = {"eps": EPS, "scales_layout": layout, "with_normed": layout == "columns"}
    expected = norm_quantise(x, weight, **options, implementation="reference")
    if layout == "columns":
        # The middle one of a stack: reading its neighbours would show.
        stack = jnp.stack([jnp.full_like(weight, jnp.nan), weight, jnp.full_like(weight, jnp.nan)])
        actual = norm_quantise(x, stack, layer=jnp.int32(1), **options, implementation="interpret")
    else:
        actual = norm_quantise(x, weight, **options, implementation="interpret")
    assert_same(actual, expected, 3, layout)
    if layout == "columns":
        assert row_errors(actual[2], expected[2]).max() < 2e-3


def test_the_interpreter_finds_no_race() -> None:
    x, weight = inputs(2, 1024, jnp.float32, jnp.float32)
    options = {"eps": EPS, "scales_layout": "columns", "with_normed": True}
    with race_check():
        actual = mosaic.norm_quantise(x, weight[None], jnp.int32(0), **options, interpret=True, detect_races=True)
        jax.block_until_ready(actual)
    assert_same(actual, norm_quantise(x, weight, **options, implementation="reference"), 2, "columns")


@pytest.mark.parametrize("size", [2048, 7168])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_the_kernel_lowers_for_a_gpu_at_the_sizes_of_step3(size: int, layout: ScalesLayout) -> None:
    def run(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, ...]:
        return norm_quantise(x, weight, eps=EPS, scales_layout=layout, with_normed=True, implementation="mosaic")

    for columns in (size, size + 512):
        shapes = jax.ShapeDtypeStruct((63, columns), jnp.bfloat16), jax.ShapeDtypeStruct((size,), jnp.bfloat16)
        assert "mosaic_gpu" in lower_for_cuda(run, *shapes)


def test_what_does_not_fit_is_refused() -> None:
    call = inspect.unwrap(norm_quantise)
    with pytest.raises(ValueError, match=r"x is \(2, 128\) and weight \(256,\)"):
        call(jnp.ones((2, 128)), jnp.ones(256), eps=EPS)
    with pytest.raises(ValueError, match=r"weight is \(3, 128\) and layer is None: give a layer with a stack"):
        call(jnp.ones((2, 128)), jnp.ones((3, 128)), eps=EPS)
    with pytest.raises(ValueError, match="x is float16; allowed: bfloat16, float32"):
        call(jnp.ones((2, 128), jnp.float16), jnp.ones(128), eps=EPS)
    with pytest.raises(NotImplementedError, match="D to be a multiple of 1024 and at most 8192, but it is 128"):
        call(jnp.ones((2, 128)), jnp.ones(128), eps=EPS, implementation="interpret")


@pytest.mark.kernels
@pytest.mark.parametrize("size", [1024, 2048, 7168, 8192])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("weight_dtype", [jnp.float32, jnp.bfloat16])
def test_the_kernel_at_every_size_and_dtype(
    size: int, dtype: jax.typing.DTypeLike, weight_dtype: jax.typing.DTypeLike
) -> None:
    x, weight = inputs(5, size, dtype, weight_dtype)
    options = {"eps": EPS, "scales_layout": "rows", "with_normed": True}
    actual = norm_quantise(x, weight, **options, implementation="interpret")
    expected = norm_quantise(x, weight, **options, implementation="reference")
    assert_same(actual, expected, 5, "rows")
    assert actual[2].dtype == expected[2].dtype
    assert row_errors(actual[2], expected[2]).max() < 2e-3
