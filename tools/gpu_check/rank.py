"""What is no single kernel: the device's own rates, and a whole rank's decode step."""

from __future__ import annotations

import functools
import statistics
import time

import jax
import numpy as np

from tools import gpu_compile
from tools.gpu_check import measure
from tools.rank_step import COMPILER_OPTIONS, decode_step, decode_steps
from tools.rank_weights import RankSizes, make_state, make_weights

SMALL = RankSizes(
    hidden=1024,
    query_rank=1024,
    num_layers=3,
    first_dense=1,
    last_dense=1,
    dense_width=1024,
    num_experts=16,
    expert_width=128,
    shared_width=1024,
    vocab=256,
    batch=2,
    context=70,
)
# Steps of one program, and programs; the first is left out.
STEPS, RUNS = 8, 4
# Share of the measured roofline that the step aims at.
GOAL = 0.85


def ceilings(mode: str, *, is_quick: bool) -> dict[str, object]:
    """The rates that times are judged by; on a CPU only that the measurement runs."""
    del is_quick
    if mode == "compile":
        return {"status": "PASS", "reason": "nothing to measure"}
    return {"status": "PASS", "ceilings": measure.ceilings(scale=1.0 if mode == "gpu" else 1e-3)}


def rank_step(mode: str, *, is_quick: bool) -> dict[str, object]:
    """One rank's step of all 61 layers; on a CPU three narrow layers, or the compiled program."""
    if mode == "interpret":
        return _interpret()
    if mode == "compile":
        return _compile(SMALL if is_quick else RankSizes())
    if is_quick:
        return {"status": "SKIPPED", "reason": "not in a quick run"}
    return _measure(RankSizes())


def _measure(sizes: RankSizes) -> dict[str, object]:
    """Time of a step among others in one program, and of steps started one by one."""
    weights = jax.jit(functools.partial(make_weights, sizes))()
    state, table = jax.jit(functools.partial(make_state, sizes))()
    jax.block_until_ready((weights, state))
    copy = measure.ceilings(scale=0.25)["copy_bytes_per_s"]

    def timed(count: int, state: object) -> tuple[float, object]:
        start = time.perf_counter()
        state = jax.block_until_ready(loop(weights, state, table, count))
        return (time.perf_counter() - start) / count, state

    options = {"donate_argnums": 1, "compiler_options": COMPILER_OPTIONS}
    loop = jax.jit(functools.partial(decode_steps, sizes=sizes, implementation="mosaic"), **options)
    _, state = timed(1, state)
    times = []
    for _ in range(RUNS):
        seconds, state = timed(STEPS, state)
        times.append(seconds)
    in_loop = statistics.median(times)
    # The lengths grow with each step by one token of 4,096: no difference to the time.
    single = jax.jit(functools.partial(decode_step, sizes=sizes, implementation="mosaic"), **options)
    state = jax.block_until_ready(single(weights, state, table))
    start = time.perf_counter()
    for _ in range(STEPS):
        state = single(weights, state, table)
    jax.block_until_ready(state)
    one_by_one = (time.perf_counter() - start) / STEPS
    floor = sizes.step_bytes / copy
    in_range = bool(np.all((np.asarray(state.tokens) >= 0) & (np.asarray(state.tokens) < sizes.rank_vocab)))
    return {
        "status": "PASS" if in_range else "FAIL",
        "us": in_loop * 1e6,
        "one_by_one_us": one_by_one * 1e6,
        "host_share": one_by_one / in_loop - 1,
        "step_bytes": sizes.step_bytes,
        "floor_us": floor * 1e6,
        "share": floor / in_loop,
        "gb_per_s": sizes.step_bytes / in_loop / 1e9,
        "goal": GOAL,
        "goal_reached": floor / in_loop >= GOAL,
        "tokens_per_s": sizes.batch / in_loop,
        "reason": f"{sizes.batch / in_loop:.0f} tokens/s a GPU, the exchange between ranks not included",
    }


def _interpret() -> dict[str, object]:
    """The small step, composed as on a GPU, of the references: each kernel has its own case in the interpreter.

    Interpreted whole it did not finish, for a reason not found; kernels that do not wait for each other, which a CPU runs
    at once while the interpreter keeps one memory for all, are the suspicion.
    """
    weights = make_weights(SMALL)
    state, table = make_state(SMALL)
    step = jax.jit(functools.partial(decode_step, sizes=SMALL, implementation="reference"))
    before = np.asarray(state.pages.key_scales)
    after = step(weights, step(weights, state, table), table)
    tokens, lengths = np.asarray(after.tokens), np.asarray(after.lengths)
    written = int((np.asarray(after.pages.key_scales) != before).sum())
    is_right = (
        bool(((tokens >= 0) & (tokens < SMALL.rank_vocab)).all())
        and bool((lengths == SMALL.context + 2).all())
        and written == 2 * SMALL.batch * SMALL.num_layers
    )
    return {"status": "PASS" if is_right else "FAIL", "reason": f"references; {written} rows written to the cache"}


def _compile(sizes: RankSizes) -> dict[str, object]:
    """The step lowered for CUDA, and where the compiler is installed compiled; copies of the cache would show as memory."""
    weights, (state, table) = jax.eval_shape(lambda: (make_weights(sizes), make_state(sizes)))
    step = functools.partial(decode_step, sizes=sizes, implementation="mosaic")
    if gpu_compile.missing():
        jax.jit(step).trace(weights, state, table).lower(lowering_platforms=("cuda",))
        return {"status": "PASS", "reason": f"lowered only: {gpu_compile.missing()}"}
    compiled = gpu_compile.compile_for(
        gpu_compile.h100_mesh(), step, weights, state, table, donate=(1,), compiler_options=COMPILER_OPTIONS
    )
    memory = compiled.memory_analysis()
    given, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    return {
        "status": "PASS",
        "argument_bytes": given,
        "temp_bytes": temporary,
        "reason": f"arguments {given / 1e9:.1f} GB, temporary {temporary / 1e9:.2f} GB",
    }
