"""FP8 product with block scales: the reference against float64, the kernel in the interpreter against the reference."""

from __future__ import annotations

import inspect
import subprocess
import sys
import textwrap
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.compat import race_check
from pallas_kernels.fp8_matmul import fp8_matmul, mosaic, schedule
from pallas_kernels.quantise import FP8, ScalesLayout, quantise_rows, scales_to_columns
from tests.kernels.support import lower_for_cuda, row_errors

# (N, K) of Step3: query down, query up, output, shared expert in and out, dense in.
STEP3_SHAPES = [(2048, 7168), (16384, 2048), (7168, 16384), (5120, 7168), (7168, 5120), (18432, 7168)]


class Operands(NamedTuple):
    x: jax.Array
    x_scales: jax.Array
    weight: jax.Array
    weight_scales: jax.Array

    def exact(self, layer: int | None = None) -> np.ndarray:
        """The product of the dequantised operands, in float64."""
        x, x_scales, weight, weight_scales = (np.asarray(array).astype(np.float64) for array in self)
        if layer is not None:
            weight, weight_scales = weight[layer], weight_scales[layer]
        wide = x * np.repeat(x_scales, 128, axis=1)[:, : x.shape[1]]
        expanded = np.repeat(np.repeat(weight_scales, 128, axis=0), 128, axis=1)[: weight.shape[0], : x.shape[1]]
        return wide @ (weight * expanded).T


def operands(m: int, n: int, k: int, *, layers: int | None = None, seed: int = 0) -> Operands:
    """Random operands whose blocks differ in size by up to 16, so that a wrong scale shows."""
    random = np.random.default_rng(seed)
    lead = () if layers is None else (layers,)
    x = random.standard_normal((m, k)) * np.exp2(random.integers(-3, 3, (m, 1)))
    weight = jnp.asarray(random.standard_normal((*lead, n, k)), jnp.float32).astype(FP8)
    weight_scales = np.exp2(random.uniform(-2, 2, (*lead, -(-n // 128), -(-k // 128))))
    return Operands(*quantise_rows(jnp.asarray(x, jnp.float32)), weight, jnp.asarray(weight_scales, jnp.float32))


def run_kernel(given: Operands, layer: int = 0, layout: ScalesLayout = "rows", **options: int) -> jax.Array:
    """The kernel in the interpreter, float32 results."""
    weight, weight_scales = (array if array.ndim == 3 else array[None] for array in given[2:])
    x_scales = given.x_scales if layout == "rows" else scales_to_columns(given.x_scales)
    return mosaic.fp8_matmul(
        given.x,
        x_scales,
        weight,
        weight_scales,
        jnp.int32(layer),
        scales_layout=layout,
        out_dtype=jnp.dtype(jnp.float32),
        interpret=True,
        **{"cluster": 1, **options},
    )


@pytest.mark.parametrize(("m", "n", "k"), [(1, 8, 16), (5, 200, 300), (3, 1300, 256)])
def test_the_reference_is_the_product_of_the_dequantised_operands(m: int, n: int, k: int) -> None:
    given = operands(m, n, k)
    result = fp8_matmul(*given, out_dtype=jnp.float32, implementation="reference")
    assert row_errors(result, given.exact()).max() < 1e-6


def test_a_layer_of_a_stack_is_the_same_as_the_layer_alone() -> None:
    given = operands(4, 1100, 200, layers=3)
    for layer in (0, 2, jnp.int32(1)):
        result = fp8_matmul(*given, layer=layer, out_dtype=jnp.float32, implementation="reference")
        assert row_errors(result, given.exact(int(layer))).max() < 1e-6


def test_both_layouts_of_the_scales_mean_the_same() -> None:
    given = operands(6, 64, 256)
    by_rows = fp8_matmul(*given)
    by_columns = fp8_matmul(
        given.x, scales_to_columns(given.x_scales), given.weight, given.weight_scales, scales_layout="columns"
    )
    np.testing.assert_array_equal(by_rows.astype(jnp.float32), by_columns.astype(jnp.float32))
    assert by_rows.dtype == jnp.bfloat16


def test_the_kernel_takes_five_rows_partial_blocks_and_shares_of_k() -> None:
    given = operands(5, 136, 400)
    result = run_kernel(given, block_m=64, split_k=2, num_ctas=3, stages=2)
    assert row_errors(result, given.exact()).max() < 1e-6


def test_the_kernel_reads_one_layer_alone_and_two_row_tiles() -> None:
    given = operands(72, 128, 256, layers=3)
    # Another layer must not be read, nor a scale past the last row.
    others = jnp.array([True, False, True])[:, None, None]
    poisoned = given._replace(
        weight=jnp.where(others, jnp.asarray(jnp.nan, FP8), given.weight),
        weight_scales=jnp.where(others, jnp.nan, given.weight_scales),
    )
    result = run_kernel(poisoned, layer=1, layout="columns", block_m=64, split_k=1, num_ctas=1, stages=2)
    assert row_errors(result, given.exact(1)).max() < 1e-6


def test_the_interpreter_finds_no_race_in_the_ring() -> None:
    given = operands(16, 64, 512)
    with race_check():
        result = run_kernel(given, block_m=64, split_k=1, num_ctas=1, stages=2, detect_races=True)
        result.block_until_ready()
    assert row_errors(result, given.exact()).max() < 1e-6


def test_a_missing_wait_for_a_free_buffer_is_found() -> None:
    # In a separate process: a missing wait can do anything to the interpreter, including hang it.
    program = """
        import jax.numpy as jnp
        from jax.experimental.pallas import mosaic_gpu as plgpu
        from pallas_kernels.compat import race_check
        from tests.kernels.test_fp8_matmul import operands, run_kernel
        waits, wait = [], plgpu.barrier_wait
        def wait_but_not_for_a_free_buffer(barrier):
            # Calls while the kernel is traced: for a full buffer, for a free one, for the last ones.
            waits.append(barrier)
            if len(waits) != 2:
                wait(barrier)
        plgpu.barrier_wait = wait_but_not_for_a_free_buffer
        try:
            with race_check():
                run_kernel(
                    operands(16, 64, 512), block_m=64, split_k=1, num_ctas=1, stages=2, detect_races=True
                ).block_until_ready()
        except Exception as error:
            print("found:", type(error).__name__)
        assert len(waits) == 3, len(waits)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    except subprocess.TimeoutExpired:
        return
    assert "found:" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.parametrize("m", [1, 64, 128, 4096, 8191])
def test_the_kernel_lowers_for_a_gpu_at_the_sizes_of_step3(m: int) -> None:
    n, k = STEP3_SHAPES[2] if m != 8191 else STEP3_SHAPES[3]

    def run(*args: jax.Array) -> jax.Array:
        return fp8_matmul(*args[:4], layer=args[4], scales_layout="columns", implementation="mosaic")

    args = [((m, k), FP8), ((k // 128, -(-m // 4) * 4), jnp.float32), ((2, n, k), FP8)]
    args += [((2, n // 128, k // 128), jnp.float32), ((), jnp.int32)]
    assert "mosaic_gpu" in lower_for_cuda(run, *(jax.ShapeDtypeStruct(*arg) for arg in args))


def test_auto_is_the_kernel_on_a_gpu_and_the_reference_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STEP3_KERNELS", raising=False)
    given = operands(8, 128, 128)
    assert "mosaic_gpu" in lower_for_cuda(fp8_matmul, *given)
    np.testing.assert_array_equal(
        fp8_matmul(*given).astype(jnp.float32),
        fp8_matmul(*given, implementation="reference").astype(jnp.float32),
    )


@pytest.mark.parametrize(
    ("m", "n", "k", "block_m", "split_k", "cluster", "num_ctas"),
    [
        (1, 128, 128, 64, 1, 1, 4),
        (70, 300, 500, 64, 2, 1, 5),
        (200, 640, 384, 128, 8, 1, 32),
        (200, 640, 384, 128, 4, 2, 16),
        (2000, 200, 130, 192, 1, 1, 3),
        (300, 520, 256, 128, 1, 2, 4),
    ],
)
def test_every_block_of_every_tile_is_computed_once(
    m: int, n: int, k: int, block_m: int, split_k: int, cluster: int, num_ctas: int
) -> None:
    plan = schedule.make(m, n, k, block_m=block_m, split_k=split_k, cluster=cluster, num_ctas=num_ctas)
    seen: dict[tuple[int, int], list[int]] = {}

    def visit(tile: schedule.Index, start: schedule.Index, stop: schedule.Index, done: schedule.Index) -> None:
        row, column = (int(index) for index in plan.place(tile))
        assert 0 <= row < plan.row_tiles
        assert 0 <= column < plan.column_tiles
        assert 0 <= stop - start <= plan.share
        seen.setdefault((row, column), []).extend(range(int(start), int(stop)))

    with jax.disable_jit():
        workers = range(min(plan.num_workers, plan.num_tiles))
        counts = [
            int(plan.for_each_tile(jnp.int32(worker), jnp.int32(rank), visit))
            for worker in workers
            for rank in range(split_k)
        ]
    assert sum(counts) == plan.num_tiles * plan.depth
    assert max(counts) <= -(-plan.num_tiles // plan.num_workers) * plan.share
    assert len(seen) == plan.num_tiles
    assert all(sorted(blocks) == list(range(plan.depth)) for blocks in seen.values())


def test_a_cluster_that_cannot_be_is_refused() -> None:
    for split, cluster in ((3, 1), (8, 2)):
        with pytest.raises(ValueError, match=f"not among {split} with {cluster} tiles"):
            schedule.make(64, 128, 128, block_m=64, split_k=split, cluster=cluster)


@pytest.mark.parametrize("m", [1, 64, 128])
@pytest.mark.parametrize(("n", "k"), STEP3_SHAPES)
def test_a_decode_step_is_bound_by_the_bytes_of_the_weight(m: int, n: int, k: int) -> None:
    plan = schedule.make(m, n, k, **schedule.default_blocks(m, n, k))
    bytes_us = (m + n) * k / schedule.HBM_BYTES
    turns = -(-plan.num_tiles // plan.num_workers)
    assert schedule.estimate_us(plan) < 1.5 * bytes_us + turns * schedule.EXCHANGE_US


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.ones((4, 256))}, "x is float32; it must be float8_e4m3fn"),
        ({"x_scales": jnp.ones((4, 3))}, r"x_scales are \(4, 3\).*must be \(4, 2\)"),
        ({"weight": jnp.ones((64, 128), FP8)}, r"the same K"),
        ({"weight_scales": jnp.ones((2, 2))}, r"weight_scales are \(2, 2\).*must be \(1, 2\)"),
        ({"layer": 0}, r"give a layer with a stack"),
        ({"out_dtype": jnp.int32}, "out_dtype is int32; allowed"),
        ({"scales_layout": "columns", "x_scales": jnp.ones((3, 4))}, r"must be \(2, 4\)"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(change: dict[str, object], message: str) -> None:
    arguments = operands(4, 64, 256)._asdict() | change
    # Without the tests' own check of shapes, which comes first.
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(fp8_matmul)(**arguments)


def test_a_layer_outside_the_stack_is_refused() -> None:
    with pytest.raises(ValueError, match="layer is 2; the stack has layers 0 to 1"):
        fp8_matmul(*operands(4, 64, 256, layers=2), layer=2)


@pytest.mark.kernels
@pytest.mark.parametrize("block_m", [64, 128, 192])
@pytest.mark.parametrize(("split_k", "cluster"), [(1, 1), (2, 1), (8, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 128, 128), (8, 72, 640), (130, 320, 272), (200, 136, 384)])
def test_the_kernel_in_every_tiling(m: int, n: int, k: int, split_k: int, cluster: int, block_m: int) -> None:
    if split_k * (block_m // 64 + 1) > 24:
        pytest.skip(
            "the interpreter needs a thread for each warpgroup of a cluster, and XLA has 32 for all it computes"
        )
    given = operands(m, n, k, seed=m)
    options = {"block_m": block_m, "split_k": split_k, "cluster": cluster, "num_ctas": 4, "stages": 3}
    result = run_kernel(given, **options)
    assert row_errors(result, given.exact()).max() < 1e-6
    np.testing.assert_array_equal(result, run_kernel(given, **options))


@pytest.mark.kernels
@pytest.mark.parametrize(("split_k", "cluster"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)])
def test_the_interpreter_finds_no_race_between_warpgroups_and_tiles(split_k: int, cluster: int) -> None:
    given = operands(136, 384, 384)
    options = {"block_m": 128, "split_k": split_k, "cluster": cluster, "num_ctas": 2, "stages": 2}
    with race_check():
        result = run_kernel(given, **options, detect_races=True)
        result.block_until_ready()
    assert row_errors(result, given.exact()).max() < 1e-6
