"""Checks beyond single kernels: the device's own rates, and a whole rank's decode step."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.common import ENVIRONMENT_VARIABLE, Implementation
from pallas_kernels.compat import IS_0_11
from pallas_kernels.pages import KVPages, decode_rows
from pallas_kernels.storage import PAGE_SIZE
from step3_jax.gpu import compiler_options
from tools import gpu_compile
from tools.gpu_check import measure

if TYPE_CHECKING:
    from step3_jax.engine.state import Report
    from tools.gpu_check.rank_model import RankModel

# Called with what comes next, or with what is known already.
Say = Callable[..., None]

# Calls with as many steps as a program takes; the first is not counted.
RUNS = 4
# Share of the measured roofline that the step aims at. The roofline counts bytes; the shared expert's arithmetic on the rows
# of all ranks, which they cannot hide, leaves 0.92 at the most.
GOAL, MOST = 0.85, 0.92
# Seconds of silence allowed while a step of all layers is compiled, or 66 GB are made.
LONG_S = 180.0
# The same for the small step on a CPU that others use too.
INTERPRETED_S = 1200.0
# Keys of the interpreted step against the references', both as stored in FP8. In the first layer a key that lies between
# two FP8 numbers may go either way, later every activation may: 0.027 and 0.13 were seen, and 1.4 is no relation at all.
FIRST_LAYER_ERROR, LAYER_ERROR = 0.05, 0.2


def ceilings(mode: str, say: Say, *, are_more: bool) -> dict[str, object]:
    """The rates that times are judged by; on a CPU it only checks that the measurement runs."""
    if mode == "compile":
        return {"status": "PASS", "reason": "nothing to measure"}
    run = measure.more_ceilings if are_more else measure.ceilings
    return {"status": "PASS", "ceilings": run(say, scale=1.0 if mode == "gpu" else 1e-3)}


def rank_step(
    mode: str, say: Say, report: Say, *, is_quick: bool, copy_rate: float | None, deadline: float
) -> dict[str, object]:
    """One rank's step of all 61 layers; on a CPU four narrow layers, or the compiled program.

    Args:
      mode: "gpu", "interpret" or "compile".
      say: Called with what comes next.
      report: Called with what is known already.
      is_quick: See the command's --quick.
      copy_rate: Bytes a second of a copy, as measured; measured here if None.
      deadline: `time.time()` after which nothing new is started.
    """
    missing = [name for name in ("flax", "jaxtyping") if not importlib.util.find_spec(name)]
    if missing:
        return {"status": "SKIPPED", "reason": f"the model needs {' and '.join(missing)}: pip install -e ."}
    if mode == "gpu" and is_quick:
        return {"status": "SKIPPED", "reason": "not in a quick run"}
    # The kernels' own checks run without the model and its libraries.
    from tools.gpu_check.rank_model import RankModel, RankSizes, small_sizes  # noqa: PLC0415

    if mode == "interpret":
        return _interpret(RankModel(small_sizes()), say, is_quick=is_quick)
    if mode == "compile":
        return compile_step(RankModel(small_sizes() if is_quick else RankSizes()))
    return measure_step(RankModel(RankSizes()), say, report, copy_rate=copy_rate, deadline=deadline)


def measure_step(
    model: RankModel, say: Say, report: Say, *, copy_rate: float | None, deadline: float
) -> dict[str, object]:
    """Time of a step within a longer call, which is reported at once, and of calls of one step."""
    sizes = model.sizes
    if copy_rate is None:
        say("measuring a copy")
        copy_rate = measure.ceilings(say)["copy_bytes_per_s"]
    say("making weights and cache", LONG_S)
    weights, cache = jax.block_until_ready((jax.jit(model.make_weights)(), jax.jit(model.make_cache)()))
    given = model.make_batch()
    say("compiling the decode loop", LONG_S)
    loop = jax.jit(_loop(model), donate_argnums=1, compiler_options=compiler_options(jax.default_backend()))
    loop = loop.lower(weights, cache, *given, *_numbers(1)).compile()
    num_steps = sizes.max_steps
    times = []
    for run in range(RUNS):
        say(f"running {num_steps} steps, {run + 1} of {RUNS}")
        start = time.perf_counter()
        cache, made = jax.block_until_ready(loop(weights, cache, *given, *_numbers(num_steps)))
        times.append((time.perf_counter() - start) / num_steps)
    in_loop = statistics.median(times[1:])
    floor = model.step_bytes / copy_rate
    tokens = np.asarray(made.tokens)
    in_range = bool(np.all((tokens >= 0) & (tokens < sizes.text.vocab_size)))
    in_range &= bool(np.all(np.asarray(made.num_new) == num_steps))
    result: dict[str, object] = {
        "status": "PASS" if in_range else "FAIL",
        "us": in_loop * 1e6,
        "step_bytes": model.step_bytes,
        "floor_us": floor * 1e6,
        "share": floor / in_loop,
        "most_share": MOST,
        "gb_per_s": model.step_bytes / in_loop / 1e9,
        "goal": GOAL,
        "goal_reached": floor / in_loop >= GOAL,
        "tokens_per_s": sizes.batch / in_loop,
        "reason": f"at most {MOST:.0%}; {sizes.batch / in_loop:.0f} tokens/s a GPU, without the exchange between ranks",
    }
    report(**result)
    if time.time() > deadline:
        return result
    say("running steps one by one")
    start = time.perf_counter()
    for _ in range(num_steps):
        cache, made = loop(weights, cache, *given, *_numbers(1))
    jax.block_until_ready(cache)
    one_by_one = (time.perf_counter() - start) / num_steps
    return {**result, "one_by_one_us": one_by_one * 1e6, "host_share": one_by_one / in_loop - 1}


def compile_step(model: RankModel) -> dict[str, object]:
    """The step lowered for CUDA, and compiled if the compiler is installed; copies of the cache would show as memory."""
    if gpu_compile.missing():
        jax.jit(_loop(model)).trace(*_shapes(model)).lower(lowering_platforms=("cuda",))
        return {"status": "PASS", "reason": f"lowered only: {gpu_compile.missing()}"}
    memory = compile_loop(model).memory_analysis()
    arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    return {
        "status": "PASS",
        "argument_bytes": arguments,
        "temp_bytes": temporary,
        "reason": f"arguments {arguments / 1e9:.1f} GB, temporary {temporary / 1e9:.2f} GB",
    }


def compile_loop(model: RankModel) -> jax.stages.Compiled:
    """The decode loop compiled for an H100."""
    return gpu_compile.compile_for(gpu_compile.h100_mesh(), _loop(model), *_shapes(model), donate=(1,))


def _interpret(model: RankModel, say: Say, *, is_quick: bool) -> dict[str, object]:
    """The small step, every kernel interpreted, against the references: the rows that each layer wrote to the cache.

    That takes two minutes where the interpreter compiles a kernel once (JAX 0.11), and more than ten where it does so at
    every call. There, and in a quick run, the references run alone: the composition is tested, the kernels have their
    own cases.
    """
    sizes = model.sizes
    weights, cache, given = model.make_weights(), model.make_cache(), model.make_batch()
    table = given[0].table

    def run(implementation: Implementation) -> tuple[KVPages, np.ndarray]:
        with _kernels(implementation):
            # Not donated: both runs begin with the same cache.
            after, report = jax.jit(_loop(model))(weights, cache, *given, *_numbers(1))
        return after, np.asarray(report.tokens[:, 0])

    def written(after: KVPages) -> np.ndarray:
        """Keys that each layer wrote, [layers, B, K] in float32."""
        layers = np.arange(sizes.text.num_hidden_layers)[:, None]
        pages = table[:, sizes.context // PAGE_SIZE] + sizes.layer_pages * layers
        slot = sizes.context % PAGE_SIZE
        scales = after.key_scales[pages, :, slot]
        return np.asarray(decode_rows(after.keys[pages, slot], scales, jnp.float32))

    say("running the references", INTERPRETED_S)
    after, tokens = run("reference")
    changed = int((np.asarray(after.key_scales) != np.asarray(cache.key_scales)).sum())
    is_right = bool(((tokens >= 0) & (tokens < sizes.text.vocab_size)).all())
    is_right &= changed == sizes.batch * sizes.text.num_hidden_layers
    if is_quick or not IS_0_11:
        return {"status": "PASS" if is_right else "FAIL", "reason": f"references; {changed} rows written to the cache"}
    say("running the interpreted kernels", INTERPRETED_S)
    expected, found = written(after), written(run("interpret")[0])
    errors = np.linalg.norm(found - expected, axis=(1, 2)) / np.linalg.norm(expected, axis=(1, 2))
    is_right &= bool(errors[0] < FIRST_LAYER_ERROR and (errors < LAYER_ERROR).all())
    return {
        "status": "PASS" if is_right else "FAIL",
        "error": float(errors.max()),
        "reason": f"keys of layers 1 to {len(errors)} differ by " + ", ".join(f"{error:.1e}" for error in errors),
    }


def _loop(model: RankModel) -> Callable[..., tuple[KVPages, Report]]:
    return functools.partial(model.calls.decode, max_steps=model.sizes.max_steps)


def _shapes(model: RankModel) -> tuple[object, ...]:
    """The shapes of everything that the loop takes."""
    return jax.eval_shape(lambda: (model.make_weights(), model.make_cache(), *model.make_batch(), *_numbers(1)))


def _numbers(num_steps: int) -> tuple[np.int32, np.bool_]:
    """A call's other arguments: its number of steps, and that it does not stop early."""
    return np.int32(num_steps), np.bool_(False)


@contextlib.contextmanager
def _kernels(implementation: Implementation) -> Iterator[None]:
    """Within it, "auto" means this implementation for every kernel that is traced."""
    before = os.environ.get(ENVIRONMENT_VARIABLE)
    os.environ[ENVIRONMENT_VARIABLE] = implementation
    try:
        yield
    finally:
        if before is None:
            del os.environ[ENVIRONMENT_VARIABLE]
        else:
            os.environ[ENVIRONMENT_VARIABLE] = before
