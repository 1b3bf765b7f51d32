"""Times on the device: many calls inside one program, inputs in turn, medians; and the ceilings to judge them by."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from step3_jax.gpu import compiler_options

WARM_UP = 3
RUNS = 7
# Long enough that starting a program and waiting for its end do not matter.
TARGET_SECONDS = 0.02
MAX_CALLS = 400
# Seconds of silence allowed while a program is compiled, with others compiling at the same time.
COMPILING_S = 120.0


def compiled(run: Callable[..., object], *args: object) -> Callable[..., object]:
    """`run` compiled for `args`, as all programs for GPUs are, so that compiling and running are timed apart."""
    return jax.jit(run).lower(*args).compile(compiler_options=compiler_options(jax.default_backend()))


def silent(doing: str, allowed_s: float | None = None) -> None:
    """For use without a parent that wants to hear of progress."""


def seconds_per_call(
    run: Callable[..., object],
    sets: Sequence[tuple[object, ...]],
    *,
    carry: Callable[[tuple[object, ...], object], tuple[object, ...]] | None = None,
    runs: int = RUNS,
    say: Callable[..., None] = silent,
) -> float:
    """Median seconds of one `run(*inputs)` over `runs` programs, each of which calls it on all `sets` many times.

    All outputs are carried through the loop, so that no call is dead, and inputs pass a barrier in each iteration, so that
    no call is moved out of it.

    Args:
      run: The function to time.
      sets: Inputs to rotate among.
      carry: For a `run` that changes an input in place and returns (result, changed): the next call's inputs from its
        set and this call's output.
      runs: Programs timed.
      say: Told what comes next.
    """
    # The number of iterations is a constant of the program: otherwise the host would wait for the end of each.
    say("compiling one call", COMPILING_S)
    single = compiled(run, *sets[0])
    say("running one call")
    output = jax.block_until_ready(single(*sets[0]))
    guess = _elapsed(single, *sets[0])
    turns = max(1, min(MAX_CALLS, int(TARGET_SECONDS / max(guess, 1e-6))) // len(sets))

    def call_all(output: object, sets: Sequence[tuple[object, ...]]) -> object:
        def once(_: jax.Array, state: tuple[Sequence[object], object]) -> tuple[Sequence[object], object]:
            # Each output is carried once: a second name for it would be a copy in each iteration.
            (*_, result), changed = state
            results = []
            for inputs in sets:
                tied = lax.optimization_barrier(inputs)
                if carry is None:
                    result = run(*tied)
                else:
                    result, changed = run(*carry(tied, (result, changed)))
                results.append(result)
            return results, changed

        result, changed = (output, None) if carry is None else output
        return lax.fori_loop(0, turns, once, ([result] * len(sets), changed))

    say(f"compiling {turns} turns of {len(sets)} calls", COMPILING_S)
    program = compiled(call_all, output, sets)
    say("timing")
    for _ in range(WARM_UP):
        jax.block_until_ready(program(output, sets))
    return statistics.median(_elapsed(program, output, sets) for _ in range(runs)) / (turns * len(sets))


def _elapsed(program: Callable[..., object], *args: object) -> float:
    start = time.perf_counter()
    jax.block_until_ready(program(*args))
    return time.perf_counter() - start


def ceilings(say: Callable[..., None] = silent, *, scale: float = 1.0) -> dict[str, float]:
    """What this device reaches: bytes per second of a copy, and FLOPs per second of a large bfloat16 product.

    Args:
      say: Called with what comes next.
      scale: Shrinks the arrays, to try it on a CPU.
    """
    source = _words(1e9 * scale)
    copy = seconds_per_call(lambda x: x ^ jnp.uint32(1), [(source,)], say=say)
    num_bytes = source.nbytes
    del source
    left, right = _squares(scale)
    product = functools.partial(jnp.matmul, preferred_element_type=jnp.bfloat16)
    bf16 = seconds_per_call(product, [(left, right)], say=say)
    return {"copy_bytes_per_s": 2 * num_bytes / copy, "bf16_flops": 2 * left.shape[0] ** 3 / bf16}


def more_ceilings(say: Callable[..., None] = silent, *, scale: float = 1.0) -> dict[str, float]:
    """The others: bytes per second of a read, FLOPs per second of a large FP8 product, seconds per launch."""
    source = _words(4e9 * scale)
    read = seconds_per_call(lambda x: lax.reduce(x, jnp.uint32(0), lax.bitwise_xor, (0,)), [(source,)], say=say)
    result = {"read_bytes_per_s": source.nbytes / read}
    del source
    left, right = _squares(scale)
    eights = (*(array.astype(jnp.float8_e4m3fn) for array in (left, right)), jnp.ones((), jnp.bfloat16))
    result["fp8_flops"] = 2 * left.shape[0] ** 3 / seconds_per_call(xla_fp8, [eights], say=say)
    # The launch of a kernel that does almost nothing, inside a loop.
    result["launch_s"] = seconds_per_call(lambda x: x + 1, [(jnp.zeros((1024,)),)], say=say)
    return result


def _words(num_bytes: float) -> jax.Array:
    """Random 32-bit words."""
    return jax.random.bits(jax.random.key(0), (int(num_bytes) // 4096 * 1024,), jnp.uint32)


def _squares(scale: float) -> tuple[jax.Array, jax.Array]:
    side = max(int(8192 * scale), 128) // 128 * 128
    left, right = (jax.random.normal(jax.random.key(seed), (side, side), jnp.bfloat16) for seed in (1, 2))
    return left, right


def xla_fp8(left: jax.Array, right: jax.Array, scale: jax.Array) -> jax.Array:
    """left [M, K] times right [N, K] transposed in e4m3, one scale each: the form that XLA passes to cuBLASLt."""
    wide = [array.astype(jnp.bfloat16) * scale for array in (left, right)]
    return lax.dot_general(*wide, (((1,), (1,)), ((), ())), preferred_element_type=jnp.bfloat16)
