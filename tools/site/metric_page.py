"""The page of the service's metrics, written from what a fresh service would answer at /metrics."""

from __future__ import annotations

import types
from typing import cast

from prometheus_client import Metric

from step3_jax.engine.config import EngineConfig
from step3_jax.engine.llm import LLM
from step3_jax.engine.stats import EngineStats
from step3_jax.server.metric import Metrics

_TEXT = """# Metrics

`step3 serve` answers `GET /metrics` in Prometheus' form. Names are vLLM's with the prefix `step3:`, which `--metrics-prefix`
changes. All have the labels `model_name` and `engine`. What to watch is in [deployment](../deployment.md#watching).

| metric | kind | labels | meaning |
| --- | --- | --- | --- |
"""
_COMMON = {"model_name", "engine", "le"}


def write_metrics() -> str:
    """Markdown: a table of all metrics of a service."""
    return _TEXT + "".join(sorted(map(_write_row, read_metrics())))


def read_metrics() -> list[Metric]:
    """All metrics of a service that has answered nothing yet."""
    metrics = Metrics("model")
    metrics.watch(cast(LLM, _idle_engine()))
    for reason in ("queue_full",):
        metrics.count_rejection(reason)
    return list(metrics.registry.collect())


def _idle_engine() -> types.SimpleNamespace:
    """What the metrics read from an `LLM`, without a model."""
    allocator = types.SimpleNamespace(num_free=1, num_pages=1)
    scheduler = types.SimpleNamespace(num_waiting=0)
    core = types.SimpleNamespace(allocator=allocator, scheduler=scheduler, num_running=0, num_waiting=0)
    stats = EngineStats()
    return types.SimpleNamespace(core=core, stats=stats, engine_config=EngineConfig())


def _write_row(metric: Metric) -> str:
    labels = {name for sample in metric.samples for name in sample.labels} - _COMMON
    # A counter's samples end in _total, and those are the names people query.
    name = f"{metric.name}_total" if metric.type == "counter" else metric.name
    if metric.name.endswith("_info"):
        labels = set()
    shown = ", ".join(f"`{label}`" for label in sorted(labels))
    return f"| `{name}` | {metric.type} | {shown} | {metric.documentation} |\n"
