"""A small model with random weights, behind an engine whose calls are recorded."""

from __future__ import annotations

import pytest

from step3_jax.bench.model import bench_config, random_model
from step3_jax.bench.throughput import Bench
from step3_jax.engine.config import EngineConfig
from step3_jax.engine.runner import Runner


@pytest.fixture(scope="session")
def runner() -> Runner:
    """Shared, so that each program is compiled once for all tests."""
    return Runner(random_model(bench_config(128, 1)))


@pytest.fixture
def bench(runner: Runner) -> Bench:
    return Bench(runner, EngineConfig(max_num_seqs=4, max_num_batched_tokens=128, stream_interval=1))
