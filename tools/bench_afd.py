"""Efficiency of AFD's executor `program` on one CPU: attention on one core, the FFN side on another.

    python -m tools.bench_afd --json out.json

Two processes, 1A1F, each bound to a core, run a model with random weights. Measured alternately are:

- alone: each role's decode program with the exchange left out, on its core, while the other core rests;
- exchange: as many exchanges as ticks, of the same size, with nothing computed;
- pipelined: the complete decode program, with 1 to 4 micro-batches of the same number of rows in flight.

A tick is a layer of one micro-batch. Efficiency is max(attention, FFN, exchange) / tick; both roles' times are of their
complete program, including sampling and head. Choose `--context` and `--expert-width` so that both sides take about equally
long. The machine must have two cores to itself.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, UInt8

from pallas_kernels.storage import PAGE_SIZE
from step3_jax.afd.placement import place_model
from step3_jax.afd.program import attention_loop, ffn_loop
from step3_jax.afd.program.attention_process import AttentionProcess
from step3_jax.afd.program.call import Numbers
from step3_jax.afd.program.executor import make_program_executor
from step3_jax.afd.program.ffn_process import FfnProcess
from step3_jax.afd.program.wire import Slots, Wire
from step3_jax.afd.topology import UNION, AfdTopology
from step3_jax.bench.model import random_model
from step3_jax.config import ModelConfig, TextConfig
from step3_jax.distributed import initialise_distributed
from step3_jax.engine.drive.call import AllocateCache, Decode, sizes_of
from step3_jax.engine.drive.worker import CachedWorker
from step3_jax.engine.executor import Started
from step3_jax.engine.state import DecodeBatch, DecodeCall
from step3_jax.layout.deployment import parse_topology
from step3_jax.sampling.batch import SamplingBatch, SamplingRow, sampling_batch
from step3_jax.sampling.params import SamplingParams

MICROBATCHES = (1, 2, 3, 4)
NUM_EXPERTS = 8
# Of a micro-batch's rows with a square matrix: about as long as a tick.
PRODUCTS = 4
# A second thread on the one core, which waits in an exchange while the first one computes, and an order of work for that.
OVERLAP = {"PJRT_NPROC": "2", "XLA_FLAGS": "--xla_cpu_enable_concurrency_optimized_scheduler=true"}
# Options with their defaults; a row is a sequence of a micro-batch.
SIZES = {"hidden": 1024, "layers": 8, "expert_width": 256, "context": 512, "rows": 32, "steps": 16, "rounds": 5}


class SilentWire(Wire):
    """Exchanges nothing: a role's own bytes come back, and FFN rows get experts at random."""

    def rows(self, arrived: Slots) -> UInt8[Array, "rows row_bytes"]:
        rows, form = super().rows(arrived), self._form
        rng = np.random.default_rng(0)
        experts = np.stack([rng.permutation(NUM_EXPERTS)[: form.top_k] for _ in range(rows.shape[0])])
        packed = form.pack(jnp.zeros((rows.shape[0], form.hidden_size)), jnp.asarray(experts), jnp.ones(experts.shape))
        return jnp.concatenate([rows[:, : -6 * form.top_k], packed[:, -6 * form.top_k :]], axis=1)

    def is_over(self, arrived: Slots) -> Bool[Array, ""]:
        return jnp.zeros((), bool)

    def _swap(self, slot: UInt8[Array, " slot"]) -> UInt8[Array, " slot"]:
        # That the last byte, which the result is made of, depends on the others keeps the work from being left out.
        return slot.at[-1].set(jnp.sum(slot, dtype=jnp.uint8))


def make_config(arguments: argparse.Namespace) -> ModelConfig:
    """Layers of experts alone; a small vocabulary, so that the head is no matter."""
    hidden = arguments.hidden
    text = TextConfig(
        hidden_size=hidden,
        intermediate_size=hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=hidden // 64,
        head_dim=64,
        share_q_dim=hidden // 2,
        moe_num_experts=NUM_EXPERTS,
        moe_top_k=2,
        moe_intermediate_size=arguments.expert_width,
        share_expert_dim=arguments.expert_width,
        moe_layers=tuple(range(arguments.layers)),
        vocab_size=512,
        max_position_embeddings=8192,
    )
    return ModelConfig(text=text, vision=None, dtype="float32", image_token_id=1, eos_token_id=0)


class Rank:
    """One of the two processes."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._config = make_config(arguments)
        self._topology = AfdTopology.of(parse_topology("1a1f"))
        self._model = place_model(random_model(self._config), self._topology)
        self._mesh = Mesh(np.array(jax.local_devices()), (UNION,))

    def executor(self, count: int) -> AttentionProcess | FfnProcess:
        """The executor for a number of micro-batches."""
        return make_program_executor(
            self._model, self._topology, num_microbatches=count, payload=self._arguments.payload
        )

    def batch(self, count: int) -> tuple[DecodeBatch, SamplingBatch, int]:
        """Sequences in the middle of decoding, each with pages of its own; and the pages there are."""
        rows, context = count * self._arguments.rows, self._arguments.context
        width = -(-(context + self._arguments.steps) // PAGE_SIZE)
        table = np.arange(rows * width, dtype=np.int32).reshape(rows, width)
        params = SamplingRow(SamplingParams(temperature=0), 2**20, (0, 0), ())
        sampling = sampling_batch([params] * rows, self._config.text.vocab_size, rows)
        tokens = np.arange(rows, dtype=np.int32) % self._config.text.vocab_size
        arrays = (tokens, np.full((rows,), context, np.int32), np.ones((rows,), np.int32), np.ones((rows,), bool))
        return DecodeBatch(*map(jnp.asarray, arrays), jnp.asarray(table)), sampling, rows * width

    def pipelined(self, count: int) -> Callable[[], None]:
        """The decode call; both processes make it together."""
        executor, (batch, sampling, num_pages) = self.executor(count), self.batch(count)
        whole = Decode(DecodeCall(batch, sampling, self._arguments.steps, max_steps=self._arguments.steps))
        worker, call = executor, sizes_of(whole)
        if isinstance(executor, AttentionProcess):
            worker, call = CachedWorker(executor), whole
            worker.run(AllocateCache(num_pages, "float32"))

        def run() -> None:
            outcome = worker.run(call)
            assert isinstance(outcome, Started)
            outcome.wait()

        return run

    def alone(self, count: int) -> Callable[[], None]:
        """The same without the exchange, on this process's device."""
        executor, (batch, sampling, num_pages) = self.executor(count), self.batch(count)
        steps = self._arguments.steps
        numbers = Numbers(jnp.int32(steps), jnp.int32(0))
        weights = jax.tree.map(lambda leaf: leaf.addressable_data(0), executor.weights)
        on_own = functools.partial(jax.shard_map, mesh=self._mesh, out_specs=PartitionSpec(), check_vma=False)
        if isinstance(executor, FfnProcess):
            ffn = functools.partial(executor.loop.decode, num_rows=batch.last.shape[0], max_steps=steps)
            run_ffn = jax.jit(on_own(ffn, in_specs=PartitionSpec()))

            def feed() -> None:
                with mock.patch.object(ffn_loop, "Wire", SilentWire):
                    jax.block_until_ready(run_ffn(weights, numbers))

            return feed
        attention = functools.partial(executor.loop.decode, max_steps=steps)
        run_attention = jax.jit(on_own(attention, in_specs=PartitionSpec()), donate_argnums=1)
        cache = executor.allocate_cache(num_pages, "float32")
        held = [jax.tree.map(lambda leaf: leaf.addressable_data(0), cache)]

        def attend() -> None:
            with mock.patch.object(attention_loop, "Wire", SilentWire):
                given = batch, sampling, numbers, jnp.zeros((), bool)
                held[0], report, _ = run_attention(weights, held[0], *given)
                jax.block_until_ready((held[0], report))

        return attend

    def exchange(self, num_ticks: int, *, computes_in_turn: bool = False) -> Callable[[], None]:
        """Exchanges one after the other; both processes make them together.

        Args:
          num_ticks: How many.
          computes_in_turn: Whether one of the two, alternately, computes for a few milliseconds before each exchange.
        """
        executor = self.executor(1)
        wire = Wire(self._topology, executor.form, self._arguments.rows)
        is_attention = isinstance(executor, AttentionProcess)
        matrix = jnp.full((self._arguments.hidden,) * 2, 1 / self._arguments.hidden)

        def compute(arrived: Slots) -> Slots:
            rows = jnp.broadcast_to(1.0 + arrived[0, -2], (self._arguments.rows, matrix.shape[0]))
            rows = jax.lax.fori_loop(0, PRODUCTS, lambda _, rows: rows @ matrix, rows)
            # No product can be left out, and all bytes stay as they are.
            return arrived + jnp.any(jnp.isnan(rows)).astype(arrived.dtype)

        def run() -> Array:
            def swap(number: int, arrived: Slots) -> Slots:
                if computes_in_turn:
                    arrived = jax.lax.cond(number % 2 == int(is_attention), compute, lambda same: same, arrived)
                if is_attention:
                    return wire.from_attention(wire.rows(arrived), arrived)
                return wire.from_ffn(wire.outputs(arrived), arrived)

            return jax.lax.fori_loop(0, num_ticks, swap, wire.empty())

        union = self._topology.union
        jitted = jax.jit(jax.shard_map(run, mesh=union, in_specs=(), out_specs=PartitionSpec(), check_vma=False))
        return lambda: jax.block_until_ready(jitted())


def run_rank(arguments: argparse.Namespace) -> None:
    """What each of the two processes does; process 0 prints the result."""
    own_core = sorted(os.sched_getaffinity(0))[int(os.environ["STEP3_PROCESS_ID"]) % len(os.sched_getaffinity(0))]
    os.sched_setaffinity(0, {own_core})
    initialise_distributed()
    rank, is_attention = Rank(arguments), jax.process_index() == 0
    num_ticks = arguments.layers * 3 * arguments.steps
    together = {f"pipelined {count}": rank.pipelined(count) for count in MICROBATCHES} | {
        "exchange": rank.exchange(num_ticks)
    }
    own = rank.alone(3)
    times: dict[str, list[float]] = {name: [] for name in (*together, "attention", "ffn")}
    # The first round compiles.
    for number in range(arguments.rounds + 1):
        for name, own_times in times.items():
            multihost_utils.sync_global_devices(f"{name} {number}")
            begin = time.perf_counter()
            if name in together:
                together[name]()
            elif (name == "attention") == is_attention:
                own()
            elapsed = time.perf_counter() - begin
            if number:
                # Of what one process does alone, the other has measured nothing.
                seen = multihost_utils.process_allgather(np.array(elapsed, np.float32))
                own_times.append(float(seen[1 if name == "ffn" else 0]))
    if is_attention:
        print("answer", json.dumps(summarise(times, arguments)), flush=True)


def summarise(times: dict[str, list[float]], arguments: argparse.Namespace) -> dict[str, object]:
    """Milliseconds a tick, efficiencies and ratios of throughput, from the medians of the rounds."""
    steps, layers = arguments.steps, arguments.layers
    median = {name: statistics.median(values) for name, values in times.items()}
    tick = {name: 1e3 * median[name] / (layers * 3 * steps) for name in ("attention", "ffn", "exchange")}
    rows = {}
    for count in MICROBATCHES:
        name = f"pipelined {count}"
        own_tick = 1e3 * median[name] / (layers * count * steps)
        rows[str(count)] = {
            "tick_ms": own_tick,
            "efficiency": max(tick.values()) / own_tick,
            "tokens_per_s": count * arguments.rows * steps / median[name],
        }
    return {
        "conditions": describe_conditions(arguments),
        "tick_ms": tick,
        "exchange_to_compute": tick["exchange"] / max(tick["attention"], tick["ffn"]),
        "microbatches": rows,
        "throughput_3_over_1": rows["3"]["tokens_per_s"] / rows["1"]["tokens_per_s"],
        "times_s": times,
    }


def show(found: dict[str, object]) -> None:
    """Prints the result for people."""
    tick, rows = found["tick_ms"], found["microbatches"]
    assert isinstance(tick, dict)
    assert isinstance(rows, dict)
    print("ms a tick alone: " + ", ".join(f"{name} {value:.2f}" for name, value in tick.items()))
    print("micro-batches  ms a tick  efficiency  tokens/s")
    for count, row in rows.items():
        print(f"{count:>13}  {row['tick_ms']:9.2f}  {row['efficiency']:10.2f}  {row['tokens_per_s']:8.0f}")
    print(f"throughput with 3 over 1: {found['throughput_3_over_1']:.2f}")


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the two processes."""
    for name, default in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help="(default: %(default)s)")
    parser.add_argument("--payload", default="float32", help="what crosses (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=900.0, metavar="S", help="(default: %(default)g)")


def start_ranks(module: str, timeout_s: float) -> dict[str, object] | None:
    """Runs a module of `tools` as two processes with this one's options; returns what process 0 prints, None if nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    common = os.environ | {"JAX_PLATFORMS": "cpu", "STEP3_COORDINATOR": address, "STEP3_NUM_PROCESSES": "2"} | OVERLAP
    command = [sys.executable, "-m", module, *sys.argv[1:]]
    processes = [
        subprocess.Popen(
            command,
            env=common | {"STEP3_PROCESS_ID": str(rank)},
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        out, _ = processes[0].communicate(timeout=timeout_s)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if "answer " not in out:
        return None
    found = json.loads(out.partition("answer ")[2].splitlines()[0])
    assert isinstance(found, dict)
    return found


def write_json(path: pathlib.Path, found: dict[str, object]) -> None:
    """Writes figures."""
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    new.replace(path)


def describe_conditions(arguments: argparse.Namespace) -> dict[str, object]:
    """The machine, its load, and the sizes that were measured."""
    return {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "load": os.getloadavg(),
        **{name: getattr(arguments, name) for name in SIZES},
        "payload": arguments.payload,
        "environment": OVERLAP,
    }


def main() -> int:
    """Starts both processes and shows what they found."""
    parser = argparse.ArgumentParser(description="Efficiency of AFD's executor program on two cores.")
    add_sizes(parser)
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the figures")
    arguments = parser.parse_args()
    if os.environ.get("STEP3_PROCESS_ID"):
        run_rank(arguments)
        return 0
    found = start_ranks("tools.bench_afd", arguments.timeout)
    if found is None:
        return 1
    show(found)
    if arguments.json is not None:
        write_json(arguments.json, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
