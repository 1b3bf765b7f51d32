"""Reused memory: aligned, large enough, and never used by two threads at once."""

from __future__ import annotations

import concurrent.futures
import threading

import jax
import ml_dtypes
import numpy as np

from step3_jax.checkpoint.buffer import ALIGNMENT, BufferPool, Buffers, empty_aligned


def test_the_memory_of_a_name_is_used_again_and_grows():
    buffers = Buffers()
    first = buffers.take("a", (4, 8), np.dtype(np.float32))
    again = buffers.take("a", (3, 5), np.dtype(ml_dtypes.bfloat16))
    assert again.shape == (3, 5)
    assert again.ctypes.data == first.ctypes.data
    assert buffers.take("a", (1000,), np.dtype(np.uint8)).size == 1000
    assert not np.shares_memory(
        buffers.take("a", (9,), np.dtype(np.uint8)), buffers.take("b", (9,), np.dtype(np.uint8))
    )


def test_jax_takes_aligned_memory_as_it_is():
    for shape in ((), (0, 3), (7,), (500, 300)):
        array = empty_aligned(shape, np.dtype(ml_dtypes.bfloat16))
        assert array.shape == shape
        assert array.size == 0 or array.ctypes.data % ALIGNMENT == 0
    placed = jax.device_put(array, jax.local_devices(backend="cpu")[0])
    assert placed.unsafe_buffer_pointer() == array.ctypes.data


def test_no_two_threads_have_the_same_buffers():
    pool, barrier = BufferPool(), threading.Barrier(3)

    def work(_):
        with pool.lend() as buffers:
            barrier.wait(timeout=30)
            return id(buffers)

    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        first = set(threads.map(work, range(3)))
        assert len(first) == 3
        assert set(threads.map(work, range(3))) == first, "they are lent again"


def test_buffers_come_back_after_an_error():
    pool = BufferPool()
    try:
        with pool.lend() as first:
            raise ValueError
    except ValueError:
        pass
    with pool.lend() as again:
        assert again is first
