"""Makes every call of a table once, on nothing, so that no program is left to compile when requests come."""

from __future__ import annotations

import concurrent.futures
import os
import time
from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Float

from step3_jax.cache.paged import Cache
from step3_jax.engine.bucket_table import BucketTable, DecodeProgram, EncodeProgram, PrefillProgram, Program
from step3_jax.engine.executor import Executor
from step3_jax.engine.pack import Packer
from step3_jax.engine.state import DecodeCall, PrefillBatch

# Gets the number of programs that are ready, and of all.
Progress = Callable[[int, int], None]
# Programs that are compiled at once: each takes memory, and the compiler has threads of its own.
MAX_THREADS = 8


def warm_up(
    executor: Executor, cache: Cache, buckets: BucketTable, packer: Packer, progress: Progress | None = None
) -> Cache:
    """Makes every call that an engine can make, each with rows that idle: what the cache holds stays as it is.

    Where the executor can trace a program without calling it, they are compiled side by side before they are called.
    The calls are made in any case: each executor then has all that it needs, which may be several programs a call and
    buffers of their own, and of several processes all take part.

    Args:
      executor: Runs the model.
      cache: Of the last call; it is consumed.
      buckets: All sizes of the calls.
      packer: Makes their arrays.
      progress: Called before the first program and after each.

    Returns:
      The cache.
    """
    programs = buckets.programs()
    features: Float[np.ndarray, "tokens D"] | None = None

    def make_call(program: Program) -> PrefillBatch | DecodeCall | None:
        if isinstance(program, PrefillProgram):
            return packer.idle_chunk(program.num_tokens, features if program.has_images else None)
        return packer.idle_decode(program.num_seqs) if isinstance(program, DecodeProgram) else None

    def tell(done: int) -> None:
        if progress is not None:
            progress(done, len(programs))

    encode = [program for program in programs if isinstance(program, EncodeProgram)]
    for done, tower in enumerate(encode):
        tell(done)
        shape = tower.num_images, 3, tower.image_size, tower.image_size
        features = executor.encode_images(np.zeros(shape, np.float32))[0]
    others = programs[len(encode) :]
    with concurrent.futures.ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        compiling = []
        for program in others:
            call = make_call(program)
            lowered = None if call is None else executor.lower(cache, call)
            compiling.append(None if lowered is None else pool.submit(lowered.compile))
        for done, (program, future) in enumerate(zip(others, compiling, strict=True), len(encode)):
            tell(done)
            if future is not None:
                begin = time.perf_counter()
                future.result()
                executor.compile_s += time.perf_counter() - begin
            call = make_call(program)
            if isinstance(call, PrefillBatch):
                cache, prefill = executor.prefill(cache, call)
                prefill.result()
            elif call is not None:
                cache, decode = executor.decode(cache, call)
                decode.result()
            else:
                cache = jax.block_until_ready(executor.copy_pages(cache, (), ()))
    tell(len(programs))
    return cache
