"""`step3 bench throughput` and `step3 bench latency`: the model, the peer, and the output."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Callable

import jax
import numpy as np

from step3_jax.bench.latency import measure_alone, measure_arrival, measure_cached
from step3_jax.bench.loop import Ours
from step3_jax.bench.machine import conditions, cpu_pressure, load_average
from step3_jax.bench.model import bench_config, random_model
from step3_jax.bench.peer import TorchPeer, check_agreement
from step3_jax.bench.report import format_report, write_section
from step3_jax.bench.scaling import measure_memory, measure_prompts, measure_sequences
from step3_jax.bench.throughput import Bench, measure_throughput
from step3_jax.bench.workload import Lengths, draw_lengths, read_lengths
from step3_jax.cli.engine import read_config
from step3_jax.config import ModelConfig
from step3_jax.cpu_count import count_cpus
from step3_jax.engine.config import EngineConfig
from step3_jax.engine.runner import Runner

# For --scaling: tokens of each sequence as their number grows, and of the requests whose memory is measured.
_SEQUENCE = Lengths(32, 16)
_MEMORY_PROMPT, _MEMORY_OUTPUT = (8, 64), (1, 16)
# Hidden size and layers.
_MEMORY_MODEL = (128, 2)
_CACHED_SHARE = 0.9


def run_engine_bench(arguments: argparse.Namespace, hidden_size: int, num_layers: int) -> int:
    """Measures, and prints tables.

    Args:
      arguments: The options of `add_engine_benches`.
      hidden_size: D.
      num_layers: L.

    Raises:
      ValueError: For impossible sizes, several processes, a peer that does not start, or logits that differ from the
        peer's.
    """
    for name in ("rounds", "prompt", "output", "arriving", "cached"):
        if getattr(arguments, name, 1) < 1:
            raise ValueError(f"--{name} is {getattr(arguments, name)}; at least 1 is needed")
    if jax.process_count() > 1:
        raise ValueError(f"step3 bench {arguments.what} measures one process: start it without step3 launch")
    config = read_config(arguments)
    measure: Callable[[argparse.Namespace, ModelConfig, EngineConfig], dict[str, object]]
    name = arguments.what
    if name == "latency":
        measure = _latency
    else:
        name, measure = ("scaling", _scaling) if arguments.scaling else ("throughput", _throughput)
    before = {"load_average_before": load_average(), "cpu_pressure_before": cpu_pressure()}
    found = measure(arguments, bench_config(hidden_size, num_layers), config)
    circumstances = {"preset": arguments.preset, "rounds": arguments.rounds, "dtype": "float32"}
    given = circumstances | {"engine": config.to_dict()}
    machine = conditions(jax.devices()[0].device_kind)
    found = {"conditions": machine | before | {"cpu_pressure_after": cpu_pressure()} | given} | found
    print(format_report(found))
    if arguments.json:
        write_section(arguments.json, name, found)
    return 0


def _throughput(arguments: argparse.Namespace, config: ModelConfig, engine: EngineConfig) -> dict[str, object]:
    lengths = (
        read_lengths(arguments.lengths)
        if arguments.lengths
        else draw_lengths(arguments.requests, arguments.prompt_tokens, arguments.output_tokens)
    )
    config = _with_positions(config, max(one.prompt + one.output for one in lengths))
    model = random_model(config)
    python = arguments.torch_python or (sys.executable if arguments.torch else None)
    with contextlib.ExitStack() as stack:
        peer, agreement, versions = None, {}, {}
        if python is not None:
            peer = stack.enter_context(TorchPeer(python, model, arguments.torch_dtype, count_cpus()))
            ids = np.random.default_rng(0).integers(2, config.text.vocab_size, (2, 24))
            ours = Ours(model)
            agreement = {name: check_agreement(ours, peer, name, ids) for name in arguments.torch_dtype}
            versions = peer.versions
        bench = Bench(Runner(model), engine)
        dtypes = arguments.torch_dtype if peer is not None else ()
        found = measure_throughput(bench, lengths, rounds=arguments.rounds, peer=peer, peer_dtypes=dtypes, tell=_tell)
    return {"torch": versions, "logits_error": agreement} | found


def _latency(arguments: argparse.Namespace, config: ModelConfig, engine: EngineConfig) -> dict[str, object]:
    # One token per piece, so that there is one decode step between two pieces.
    if arguments.stream_interval is None:
        engine = engine.replace(stream_interval=1)
    config = _with_positions(
        config, max(2 * arguments.arriving, arguments.prompt + arguments.output, arguments.cached + 1)
    )
    runner = Runner(random_model(config))
    bench, rounds = Bench(runner, engine), arguments.rounds
    _tell("latency: a stream alone ...")
    alone = measure_alone(bench, prompt_tokens=arguments.prompt, output_tokens=arguments.output, rounds=rounds)
    arrival = []
    # A stream waits for one chunk at most, so a smaller chunk is measured too.
    for chunk in sorted({max(1, engine.max_num_batched_tokens // 8), engine.max_num_batched_tokens}):
        _tell(f"latency: a stream while {arguments.arriving} tokens arrive, in chunks of {chunk} ...")
        own = (
            bench
            if chunk == engine.max_num_batched_tokens
            else Bench(runner, engine.replace(max_num_batched_tokens=chunk))
        )
        arrival.append(
            measure_arrival(own, stream_tokens=arguments.prompt, prompt_tokens=arguments.arriving, rounds=rounds)
        )
    _tell("latency: a cached prompt ...")
    cached = measure_cached(bench, prompt_tokens=arguments.cached, cached_share=_CACHED_SHARE, rounds=rounds)
    return {"stream_interval": engine.stream_interval, "alone": alone, "arrival": arrival, "cached": cached}


def _scaling(arguments: argparse.Namespace, config: ModelConfig, engine: EngineConfig) -> dict[str, object]:
    config = _with_positions(config, max(*arguments.prompts, 0) + 1)
    runner, rounds = Runner(random_model(config)), arguments.rounds

    def make_bench(count: int) -> Bench:
        return Bench(runner, engine.replace(max_num_seqs=1 << (count - 1).bit_length()))

    sequences = measure_sequences(make_bench, arguments.sequences, _SEQUENCE, rounds=rounds, tell=_tell)
    prompts = measure_prompts(Bench(runner, engine), arguments.prompts, rounds=rounds, tell=_tell)
    # This measures the engine's memory, not the model's: a small model is quicker.
    small = Bench(Runner(random_model(bench_config(*_MEMORY_MODEL))), engine)
    counts = arguments.memory_requests
    lengths = draw_lengths(max(counts), _MEMORY_PROMPT, _MEMORY_OUTPUT)
    memory = measure_memory(small, lengths, counts=counts, warm_up=-(-max(counts) // 5), tell=_tell)
    return {
        "each_sequence": _SEQUENCE._asdict(),
        "memory_model": {"hidden_size": _MEMORY_MODEL[0], "layers": _MEMORY_MODEL[1]},
        "sequences": sequences,
        "prompts": prompts,
        "memory": memory,
    }


def _with_positions(config: ModelConfig, num_tokens: int) -> ModelConfig:
    """The same sizes with positions for at least `num_tokens` tokens."""
    if num_tokens <= config.text.max_position_embeddings:
        return config
    return dataclasses.replace(config, text=dataclasses.replace(config.text, max_position_embeddings=num_tokens))


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
