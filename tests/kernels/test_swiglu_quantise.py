"""SwiGLU with FP8: the reference against float64, the kernel in the interpreter against the reference."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.compat import race_check
from pallas_kernels.quantise import ScalesLayout, scales_to_rows
from pallas_kernels.swiglu_quantise import mosaic, swiglu_quantise
from tests.kernels.support import lower_for_cuda, row_errors


def inputs(m: int, size: int, dtype: jax.typing.DTypeLike) -> tuple[jax.Array, jax.Array]:
    """Gates on both sides of zero, far ones included; a row of zeros."""
    random = np.random.default_rng(m)
    gate, up = (random.standard_normal((m, size)) * np.exp2(random.integers(-4, 6, (m, 1))) for _ in range(2))
    gate[m // 2] = 0
    return jnp.asarray(gate, dtype), jnp.asarray(up, dtype)


def assert_same(actual: tuple[jax.Array, jax.Array], expected: tuple[jax.Array, jax.Array]) -> None:
    """Equal but for values that a different exponential put on the neighbouring FP8 number."""
    np.testing.assert_allclose(actual[1], expected[1], rtol=1e-5)
    values, wanted = (np.asarray(arrays[0].astype(jnp.float32)) for arrays in (actual, expected))
    assert (np.abs(values - wanted) <= np.maximum(np.abs(wanted) / 8, 2**-9)).all()
    assert (values == wanted).mean() > 0.999


def test_the_reference_is_the_formula_in_float64_within_fp8() -> None:
    gate, up = inputs(5, 300, jnp.float32)
    values, scales = swiglu_quantise(gate, up)
    wide = np.asarray(gate).astype(np.float64)
    exact = wide / (1 + np.exp(-wide)) * np.asarray(up).astype(np.float64)
    restored = np.asarray(values).astype(np.float64) * np.repeat(np.asarray(scales), 128, axis=1)[:, :300]
    # Rounding to 4 significant bits: 2^-4 at most, some 0.027 in the mean square.
    assert row_errors(restored, exact).max() < 0.035


def test_joined_operands_mean_the_same_as_two() -> None:
    gate, up = inputs(4, 256, jnp.bfloat16)
    for joined, apart in zip(
        swiglu_quantise(jnp.concatenate([gate, up], axis=1)), swiglu_quantise(gate, up), strict=True
    ):
        np.testing.assert_array_equal(joined.astype(jnp.float32), apart.astype(jnp.float32))


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_the_kernel_gives_what_the_reference_gives(layout: ScalesLayout) -> None:
    # Two tiles of 64 rows, of which the second is not full; the second time both operands in one array.
    gate, up = inputs(70, 128, jnp.bfloat16)
    operands = (gate, up) if layout == "rows" else (jnp.concatenate([gate, up], axis=1),)
    actual, expected = (
        swiglu_quantise(*operands, scales_layout=layout, implementation=implementation)
        for implementation in ("interpret", "reference")
    )
    if layout == "columns":
        actual, expected = ((values, scales_to_rows(scales, 70)) for values, scales in (actual, expected))
    assert_same(actual, expected)


def test_the_interpreter_finds_no_race() -> None:
    gate, up = inputs(3, 256, jnp.float32)
    with race_check():
        actual = mosaic.swiglu_quantise(gate, up, scales_layout="rows", interpret=True, detect_races=True)
        jax.block_until_ready(actual)
    assert_same(actual, swiglu_quantise(gate, up, implementation="reference"))


@pytest.mark.parametrize(("m", "size"), [(1, 640), (63, 5120), (4096, 18432)])
def test_the_kernel_lowers_for_a_gpu_at_the_sizes_of_step3(m: int, size: int) -> None:
    def run(gate: jax.Array) -> tuple[jax.Array, jax.Array]:
        return swiglu_quantise(gate, scales_layout="columns", implementation="mosaic")

    assert "mosaic_gpu" in lower_for_cuda(run, jax.ShapeDtypeStruct((m, 2 * size), jnp.bfloat16))


def test_what_does_not_fit_is_refused() -> None:
    call = inspect.unwrap(swiglu_quantise)
    with pytest.raises(ValueError, match=r"gate is float32\(2, 128\) and up float32\(2, 64\)"):
        call(jnp.ones((2, 128)), jnp.ones((2, 64)))
    with pytest.raises(ValueError, match=r"gate is \(2, 127\); without up"):
        call(jnp.ones((2, 127)))
    with pytest.raises(ValueError, match="gate is float16; allowed"):
        call(jnp.ones((2, 128), jnp.float16), jnp.ones((2, 128), jnp.float16))
    with pytest.raises(NotImplementedError, match="F to be a multiple of 128, but it is 64"):
        call(jnp.ones((2, 64)), jnp.ones((2, 64)), implementation="interpret")


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("m", [1, 7, 8, 9, 64, 130])
def test_the_kernel_at_every_number_of_rows(m: int, dtype: jax.typing.DTypeLike) -> None:
    gate, up = inputs(m, 256, dtype)
    assert_same(swiglu_quantise(gate, up, implementation="interpret"), swiglu_quantise(gate, up))
