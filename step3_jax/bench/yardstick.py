"""What a machine can do: the rates of reading memory and of bare matrix products."""

from __future__ import annotations

import collections
import concurrent.futures
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from step3_jax.config import TextConfig

# Larger than the caches of any CPU that the benchmark is likely to run on.
READ_BYTES = 512 * 2**20


def read_meter(num_threads: int) -> Callable[[], float]:
    """A function that measures the best rate, bytes/s, at which this process reads memory it does not write.

    Each call tries two ways and the better one counts: a sum in XLA, and numpy's dot product of each thread's
    part with itself.
    """
    data = np.ones(READ_BYTES // 4, np.float32)
    parts = np.array_split(data, num_threads)
    on_device = jax.device_put(data)
    total = jax.jit(jnp.sum)
    total(on_device).block_until_ready()
    pool = concurrent.futures.ThreadPoolExecutor(num_threads)

    def measure() -> float:
        begin = time.perf_counter()
        total(on_device).block_until_ready()
        middle = time.perf_counter()
        list(pool.map(np.dot, parts, parts))
        return READ_BYTES / min(middle - begin, time.perf_counter() - middle)

    return measure


def prefill_products(config: TextConfig, length: int) -> dict[tuple[int, int, int], int]:
    """The matrix products of prefilling a prompt: how often each (M, N, K) occurs.

    Each expert has an even share of rows. The products of attention itself, which depend quadratically on the length,
    are not included.
    """
    hidden, rank, head = config.hidden_size, config.share_q_dim, config.head_dim
    products: collections.Counter[tuple[int, int, int]] = collections.Counter()

    def add(count: int, rows: int, *sizes: tuple[int, int]) -> None:
        for outputs, inputs in sizes:
            products[rows, outputs, inputs] += count

    num_experts, num_moe = config.moe_num_experts, len(config.moe_layers)
    query = (rank, hidden), (config.query_size, rank), (hidden, config.query_size)
    add(config.num_hidden_layers, length, *query, (head, hidden), (head, hidden))
    for count, rows, width in (
        (config.num_hidden_layers - num_moe, length, config.intermediate_size),
        (num_moe, length, config.share_expert_dim),
        (num_moe * num_experts, max(1, length * config.moe_top_k // num_experts), config.moe_intermediate_size),
    ):
        add(count, rows, (width, hidden), (width, hidden), (hidden, width))
    add(num_moe, length, (num_experts, hidden))
    add(1, 1, (config.vocab_size, hidden))
    return {shape: count for shape, count in products.items() if count}


def product_rate(dtype: str, products: Mapping[tuple[int, int, int], int], repeats: int = 5) -> float:
    """FLOP/s of these products, each at its best measured rate: XLA's, and for float32 also numpy's."""
    rng = np.random.default_rng(0)
    product = jax.jit(_product)
    operations, seconds = 0.0, 0.0
    for (rows, outputs, inputs), count in products.items():
        left, right = (rng.standard_normal((size, inputs), np.float32) for size in (rows, outputs))
        placed = jnp.asarray(left, dtype), jnp.asarray(right, dtype)
        calls: list[Callable[[], object]] = [lambda placed=placed: product(*placed).block_until_ready()]  # type: ignore[misc]
        if dtype == "float32":
            calls.append(lambda left=left, right=right: left @ right.T)  # type: ignore[misc]
        best = float("inf")
        for call in calls:
            call()
            for _ in range(repeats):
                begin = time.perf_counter()
                call()
                best = min(best, time.perf_counter() - begin)
        operations += count * 2 * rows * outputs * inputs
        seconds += count * best
    return operations / seconds


def _product(left: Float[Array, "M K"], right: Float[Array, "N K"]) -> Float[Array, "M N"]:
    return jax.lax.dot_general(left, right, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
