"""Every kernel at the real model's shapes, compiled for an H100 without one: spills, products, memory; and a whole step."""

from __future__ import annotations

import functools
import json
import math
import pathlib
import re
import subprocess
import sys

import jax
import pytest

from pallas_kernels.compat import IS_0_11
from pallas_kernels.mfa_prefill import mosaic as prefill
from pallas_kernels.swiglu_quantise import mosaic as swiglu
from tests.process import OPTIMISED, ROOT, environment
from tools import gpu_compile, launch_count, ptx, record_kernels
from tools.gpu_check import cases as case_list
from tools.gpu_check import rank
from tools.gpu_check.rank_model import RankModel, RankSizes

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.usefixtures("optimised_file"),
    pytest.mark.skipif(gpu_compile.missing() is not None, reason=str(gpu_compile.missing())),
]

SHARED_MEMORY = 232_448


@pytest.fixture(scope="module")
def known() -> dict[str, case_list.Case]:
    return {case.name: case for case in case_list.all_cases("compile", is_quick=False)}


@pytest.mark.parametrize("name", record_kernels.CASES)
def test_kernel_compiles_without_spills_to_the_products_meant(name: str, known: dict[str, case_list.Case]) -> None:
    reports = record_kernels.compile_case(gpu_compile.h100_mesh(), known[name])
    assert reports or known[name].kernel in ("grouped_matmul", "mfa_decode"), "nothing was compiled"
    for report in reports:
        assert report.spill_bytes <= record_kernels.allowed_spill_bytes(name), report
        assert report.num_mma_sync == 0, report
        assert 0 < report.registers <= 255, report
        assert report.smem_bytes <= SHARED_MEMORY, report
        assert ptx.store_fault(name, report.num_plain_stores) is None, report
    products = {kind for report in reports for kind in report.wgmma}
    expected = record_kernels.CASES[name]
    if expected is None:
        assert not products
    elif reports:
        assert products
        assert all(kind.endswith(expected) for kind in products), products


def test_a_planted_trade_of_more_registers_than_there_are_is_refused(
    known: dict[str, case_list.Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill, "REGISTERS", (232, 48))
    with pytest.raises(
        RuntimeError, match=r"mfa_prefill: 3 warpgroups .* 504 together, and ask for 2 x 232 \+ 48 = 512"
    ):
        record_kernels.compile_case(gpu_compile.h100_mesh(), known["mfa_prefill/fp8/1k"])


def test_a_planted_store_past_the_end_of_a_row_is_found(
    known: dict[str, case_list.Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whole tiles all along: the last one's scales would run into the next block's.
    monkeypatch.setattr(swiglu, "_tiles_of", lambda columns: (-(-columns // swiglu.TILE), 0))
    name = "swiglu_quantise/77x5120"
    (report,) = record_kernels.compile_case(gpu_compile.h100_mesh(), known[name])
    fault = ptx.store_fault(name, report.num_plain_stores)
    assert fault is not None
    assert "nothing cuts them off" in fault


@pytest.mark.parametrize("storage", ["bfloat16", "fp8"])
def test_cache_write_changes_the_pages_in_place(storage: str, known: dict[str, case_list.Case]) -> None:
    case = known[f"rope_cache_write/{storage}/128"]
    shapes = jax.eval_shape(lambda: case.make(0))
    run = functools.partial(case.run, implementation="mosaic")
    compiled = gpu_compile.compile_for(gpu_compile.h100_mesh(), run, *shapes, donate=(5,))
    pages = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes[5]))
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == pages
    assert memory.temp_size_in_bytes < 4096
    assert " copy(" not in compiled.as_text()


def test_a_ranks_step_of_all_layers_compiles_and_copies_neither_weights_nor_cache() -> None:
    model = RankModel(RankSizes())
    compiled = rank.compile_loop(model)
    memory = compiled.memory_analysis()
    cache = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(model.make_cache)))
    assert memory.alias_size_in_bytes >= cache
    # One layer of experts is 660 MB and a layer of the cache 277 MB: what is left are activations, and what the sampler
    # makes of [128, 128,815] logits, 66 MB each.
    assert memory.temp_size_in_bytes < 500e6
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < 78 * 2**30
    text = compiled.as_text()
    assert text.count('custom_call_target="mosaic_gpu_v2"') >= 12
    # If XLA believes that memory is short, it recomputes things several times instead of keeping them.
    assert "remat" not in text
    # A slice of a stack makes XLA change the recorded launches in every layer. The sampler copies logits.
    lines = [line.strip() for line in text.splitlines() if re.search(r" (copy|dynamic-slice)\(", line)]
    assert [line for line in lines if result_bytes(line) > 1e6 and f",{model.sizes.text.vocab_size}]" not in line] == []


def result_bytes(line: str) -> float:
    """Bytes of an HLO instruction's result."""
    found = re.search(r"= (\w+?)(\d+)?\w*\[([\d,]*)\]", line)
    if found is None:
        return 0.0
    sizes = [int(size) for size in found.group(3).split(",") if size]
    return math.prod(sizes) * int(found.group(2) or 8) / 8


def test_a_layer_launches_no_more_than_it_must(tmp_path: pathlib.Path) -> None:
    program = launch_count.compile_step(4, tmp_path)
    loops = launch_count.read_loops(tmp_path, program.as_text() or "")
    counts = {loop.layers: len(loop.launches) for loop in loops}
    # Of a layer with experts, the loop's counter among them; a dense layer has neither router nor plan.
    most = {"layers.0-1": 16 if IS_0_11 else 18, "layers.2-3": 27 if IS_0_11 else 28}
    assert counts.keys() == most.keys()
    assert all(counts[name] <= most[name] for name in most), [launch_count.table(loop) for loop in loops]
    # A slice in a loop is a launch whose address the host recomputes in each iteration.
    assert "DynamicSlice" not in next(tmp_path.glob(launch_count.SEQUENCE)).read_text()


@pytest.mark.parametrize("options", ["yes", "no"])
def test_a_gpu_filled_with_weights_and_cache_computes_nothing_twice(options: str) -> None:
    """The engine's decode loop, in a separate process where shapes are not checked. Without the options it does."""
    program = pathlib.Path(__file__).parent / "programs" / "filled_gpu.py"
    done = subprocess.run(
        [sys.executable, str(program), options],
        cwd=ROOT,
        env=environment(**OPTIMISED),
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["share"] == pytest.approx(0.9, abs=0.001)
    assert (found["remat"] == 0) == (options == "yes")
    # Five arrays of [64, 128,815] logits of it are the sampler's.
    assert found["temp"] < 250e6
