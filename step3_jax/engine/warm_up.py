"""Makes every call of a table once, without work, so that no program is left to compile when requests arrive."""

from __future__ import annotations

import collections
import concurrent.futures
import os
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from step3_jax.cache.paged import Cache
from step3_jax.engine.bucket_table import BucketTable, DecodeProgram, EncodeProgram, PrefillProgram, Program
from step3_jax.engine.executor import Executor
from step3_jax.engine.pack import Packer
from step3_jax.engine.state import DecodeCall, PrefillBatch

# Called with the numbers of ready programs and of all programs.
Progress = Callable[[int, int], None]
# Programs that are compiled in parallel: each takes memory, and the compiler has its own threads.
MAX_THREADS = 8


class _Started(NamedTuple):
    """A call to make, and its program while it is compiled; see `_make_call` and `Executor.lower`."""

    call: PrefillBatch | DecodeCall | None
    compiling: concurrent.futures.Future[jax.stages.Compiled] | None


def warm_up(
    executor: Executor, cache: Cache, buckets: BucketTable, packer: Packer, progress: Progress | None = None
) -> Cache:
    """Makes every call that an engine can make, with idle rows only: the cache's contents do not change.

    Where the executor can trace a program without calling it, programs are compiled in parallel before they are called.
    The calls are made in any case: each executor, in each of several processes, then has all that it needs, which may be
    several programs per call and their buffers.

    Args:
      executor: Runs the model.
      cache: From the last call; it is consumed.
      buckets: All sizes of the calls.
      packer: Makes their arrays.
      progress: Called before the first program and after each.

    Returns:
      The cache.
    """
    programs = buckets.programs()
    encode = [program for program in programs if isinstance(program, EncodeProgram)]
    others = programs[len(encode) :]
    features: Float[np.ndarray, "tokens D"] | None = None
    num_done = 0

    def tell(count: int) -> None:
        nonlocal num_done
        num_done += count
        if progress is not None:
            progress(num_done, len(programs))

    tell(0)
    for tower in encode:
        shape = tower.num_images, 3, tower.image_size, tower.image_size
        features = executor.encode_images(np.zeros(shape, np.float32))[0]
        tell(1)
    num_threads = min(MAX_THREADS, os.cpu_count() or 1)
    started: collections.deque[_Started] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        for program in others:
            call = _make_call(program, packer, features)
            lowered = None if call is None else executor.lower(cache, call)
            started.append(_Started(call, None if lowered is None else pool.submit(lowered.compile)))
            # A few are traced ahead, so that no thread waits for the next.
            if len(started) > num_threads:
                cache = _finish(executor, cache, started.popleft())
                tell(1)
        while started:
            cache = _finish(executor, cache, started.popleft())
            tell(1)
    return cache


def _make_call(
    program: Program, packer: Packer, features: Float[np.ndarray, "tokens D"] | None
) -> PrefillBatch | DecodeCall | None:
    """A program's call; None for copies of pages."""
    if isinstance(program, PrefillProgram):
        return packer.idle_chunk(program.num_tokens, features if program.has_images else None)
    return packer.idle_decode(program.num_seqs) if isinstance(program, DecodeProgram) else None


def _finish(executor: Executor, cache: Cache, started: _Started) -> Cache:
    """Waits until a program is compiled, and calls it."""
    call, compiling = started
    if compiling is not None:
        begin = time.perf_counter()
        compiling.result()
        executor.compile_s += time.perf_counter() - begin
    if isinstance(call, PrefillBatch):
        cache, prefill = executor.prefill(cache, call)
        prefill.result()
    elif call is not None:
        cache, decode = executor.decode(cache, call)
        decode.result()
    else:
        cache = executor.wait(executor.copy_pages(cache, (), ()))
    return cache
