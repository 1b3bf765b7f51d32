"""The options of `step3 plan simulate` about requests: arrivals, and the engine's settings."""

from __future__ import annotations

import argparse
import dataclasses

from step3_jax.cli.simulate_option import Case, read_count
from step3_jax.config import PRESETS, ModelConfig
from step3_jax.engine.bucket_table import BucketTable
from step3_jax.engine.config import EngineConfig
from step3_jax.layout.page import PAGE_SIZE, pages_for
from step3_jax.planner.memory import plan_memory
from step3_jax.planner.quantity import parse_tokens
from step3_jax.planner.shape import ModelShape
from step3_jax.planner.simulation.arrival import Arrivals, arrive_at_rate, repeat_lengths
from step3_jax.planner.simulation.scheduler import Scheduler
from step3_jax.planner.simulation.service import CallLimits
from step3_jax.planner.simulation.stage_time import RooflineTimer
from step3_jax.planner.trace_file import MAX_TOKENS, read_trace

DEFAULT_NUM_REQUESTS = 100
# A service allows this many times the running requests to run or wait.
_QUEUE_FACTOR = 4
_ENGINE_SETTINGS = (
    "max_num_seqs",
    "max_num_batched_tokens",
    "long_prefill_token_threshold",
    "stream_interval",
    "max_call_ms",
)


def read_arrivals(arguments: argparse.Namespace, shape: ModelShape) -> Arrivals:
    """Reads the requests.

    Raises:
      ValueError: If they are missing or given twice, or a line of the file is wrong.
    """
    limit = shape.max_context_tokens or MAX_TOKENS
    lengths = (read_count(arguments, "prompt_tokens"), read_count(arguments, "output_tokens"))
    if arguments.requests is not None:
        if lengths != (None, None) or arguments.num_requests is not None:
            raise ValueError(
                "--requests has the lengths of all requests: leave out --prompt-tokens, --output-tokens and --num-requests"
            )
        requests = read_trace(arguments.requests, max_tokens=limit)
    else:
        prompt, output = lengths
        if prompt is None or output is None:
            raise ValueError(
                "requests need lengths: give --prompt-tokens and --output-tokens, or a file with --requests"
            )
        if prompt > limit or prompt + output > limit:
            raise ValueError(
                f"--prompt-tokens {prompt} and --output-tokens {output}: {prompt + output:,} tokens, and "
                f"{shape.printed_name} has positions for {limit:,}"
            )
        count = DEFAULT_NUM_REQUESTS if arguments.num_requests is None else arguments.num_requests
        requests = repeat_lengths(prompt, output, count)
    if arguments.rate is not None and arguments.concurrency is not None:
        raise ValueError("--rate is for an open loop and --concurrency for a closed one: give one of them")
    if arguments.concurrency is not None:
        return Arrivals(requests, arguments.concurrency)
    if arguments.rate is not None:
        return arrive_at_rate(requests, arguments.rate, arguments.seed)
    return Arrivals(requests)


def read_scheduler(arguments: argparse.Namespace, case: Case) -> tuple[Scheduler, CallLimits]:
    """The engine's settings in the simulation's form.

    Raises:
      ValueError: For a value that the engine does not allow, or a cache of unknown size.
    """
    shards = case.topology.num_attention_devices
    workload = case.deployment.workload
    values: dict[str, object] = {}
    if workload is not None:
        values["max_num_seqs"] = workload.sequences
    for name in (
        "max_num_seqs",
        "max_num_batched_tokens",
        "long_prefill_token_threshold",
        "stream_interval",
        "max_call_ms",
    ):
        if getattr(arguments, name) is not None:
            values[name] = getattr(arguments, name)
    config = EngineConfig.of(values)
    limit = case.shape.max_context_tokens or MAX_TOKENS
    buckets = BucketTable.of(config, max_pages=pages_for(limit), num_shards=shards)
    queued = arguments.max_num_queued_reqs
    threshold = config.long_prefill_token_threshold
    scheduler = Scheduler(
        num_shards=shards,
        shard_pages=_find_cache(arguments, case) // shards // PAGE_SIZE,
        max_num_seqs=buckets.max_num_seqs,
        max_num_batched_tokens=buckets.max_num_batched_tokens,
        long_prefill_tokens=None if threshold is None else max(1, threshold // shards),
        max_queued=_QUEUE_FACTOR * config.max_num_seqs if queued is None else queued,
        has_prefill=not arguments.decode_only,
    )
    # Attention and FFN on separate devices are several processes, where the engine's default does not apply.
    call_s = None if arguments.max_call_ms is None else config.max_call_ms / 1e3
    return scheduler, CallLimits(config.stream_interval, call_s)


def count_cache_tokens(case: Case) -> int | None:
    """Tokens that a deployment's KV cache holds by the arithmetic of `plan memory`; None where it cannot say."""
    timer, name = case.timer, case.shape.name
    if not isinstance(timer, RooflineTimer) or name not in PRESETS:
        return None
    deployment = dataclasses.replace(case.deployment, kv_cache=timer.kv_dtype)
    memory_gib = timer.attention.memory_gib
    # A device other than the file's has its own memory.
    if deployment.device_memory_gib is not None and timer.attention.name == deployment.hardware:
        memory_gib = min(memory_gib, deployment.device_memory_gib)
    return plan_memory(ModelConfig.preset(name), deployment, memory_gib=memory_gib, has_remedies=False).kv_tokens


def _find_cache(arguments: argparse.Namespace, case: Case) -> int:
    if arguments.kv_cache_tokens is not None:
        return parse_tokens(arguments.kv_cache_tokens, "--kv-cache-tokens")
    found = count_cache_tokens(case)
    if found is None:
        raise ValueError("nothing says how large the KV cache is: give --kv-cache-tokens, of all devices together")
    return found
