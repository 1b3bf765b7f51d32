"""What driving other processes costs rank 0: `python -m tools.bench_drive --json benchmarks/drive.json`.

No model is computed. Workers are processes of their own with the channel and loop of real ones; their part of each call, and
rank 0's, returns at once. Timed alternately, so that they share the machine's conditions:

- an empty call to one worker and back;
- an echo of as many bytes over a loopback connection of the same library, with the same keys, and nothing else;
- a decode call of 32 sequences of up to 65,536 tokens, made through `DrivenExecutor`, without it, and through it with a
  worker's answer after it. The difference between the first two is rank 0's cost; the third says how much later than
  rank 0 a worker begins at most.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import pathlib
import secrets
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import zmq

from pallas_kernels.storage import PAGE_SIZE, Storage
from step3_jax.bench.machine import conditions, cpu_pressure, load_average
from step3_jax.cache.paged import Cache
from step3_jax.channel.address import ChannelAddress
from step3_jax.channel.driver import DriverChannel
from step3_jax.channel.end import End
from step3_jax.channel.message import Encoder
from step3_jax.channel.worker import WorkerChannel
from step3_jax.config import ModelConfig
from step3_jax.engine.drive.call import Call, MeasureMemory, to_message
from step3_jax.engine.drive.executor import DrivenExecutor
from step3_jax.engine.drive.worker import Outcome, Worker, serve_calls
from step3_jax.engine.executor import Executor, Started
from step3_jax.engine.history import HistoryPacker
from step3_jax.engine.state import DecodeBatch, DecodeCall, PrefillBatch, Report
from step3_jax.sampling.batch import SamplingRow, sampling_batch
from step3_jax.sampling.params import SamplingParams

# Of Step3: its context and vocabulary, and sequences of a batch.
MAX_PAGES, VOCAB_SIZE, NUM_SEQS, MAX_STEPS = 1024, 128_815, 32, 32
STEP_MS = 20.0
GOAL_PERCENT = 2.0
_TIMEOUT_S = 60.0
_EMPTY = MeasureMemory(0, 0)
_HISTORY = HistoryPacker(MAX_PAGES * PAGE_SIZE, MAX_STEPS)


class _IdleWorker(Worker):
    """Does nothing in each call."""

    num_processes = 2

    def run(self, call: Call) -> Outcome:
        return None


class _IdleExecutor(Executor):
    """Has its results at once."""

    def __init__(self) -> None:
        config = ModelConfig.preset("step3-tiny")
        super().__init__(config, jax.local_devices()[:1], jnp.dtype(jnp.float32), 1)
        tokens, numbers = np.zeros((NUM_SEQS, MAX_STEPS), np.int32), np.zeros((NUM_SEQS,), np.int32)
        self._report = Report(tokens, numbers, numbers, None)  # type: ignore[arg-type]

    def allocate_cache(self, num_pages: int, storage: Storage) -> Cache:
        return ()

    def prefill(self, cache: Cache, batch: PrefillBatch) -> tuple[Cache, Started[object]]:
        return cache, Started(None)

    def decode(self, cache: Cache, call: DecodeCall) -> tuple[Cache, Started[Report]]:
        return cache, Started(self._report)

    def copy_pages(self, cache: Cache, sources: Sequence[int], targets: Sequence[int]) -> Cache:
        return cache

    def _encode_images(self, pixels: np.ndarray) -> jax.Array:
        return jnp.zeros((len(pixels), 1, 1))


def work(address: ChannelAddress, rank: int) -> None:
    """A worker process."""
    channel = WorkerChannel(address, rank, f"rank {rank}")
    channel.wait_for_driver(_TIMEOUT_S)
    serve_calls(_IdleWorker(), channel)
    channel.close()


def echo(address: ChannelAddress) -> None:
    """A process that sends back what comes, until that is one empty frame."""
    end = End(zmq.DEALER, address, is_driver=False)
    end.socket.connect(address.endpoint)
    end.socket.send(b"hello")
    while (frames := end.socket.recv_multipart()) != [b""]:
        end.socket.send_multipart(frames)
    end.close()


def make_call(number: int, kept: DecodeCall | None) -> DecodeCall:
    """A decode call as the engine makes them: the sequences stand elsewhere, and most else is as in the last one.

    Args:
      number: Of the call; the page table is another one in each eighth, as sequences grow by pages.
      kept: The last one.
    """
    counts = np.full((NUM_SEQS,), 1000 + number, np.int32)
    if kept is None:
        rows = [SamplingRow(SamplingParams(temperature=0.0), 1000, (0, 0), ())] * NUM_SEQS
        mask = np.full((NUM_SEQS, -(-VOCAB_SIZE // 32)), -1, np.int32)
        table = np.zeros((NUM_SEQS, MAX_PAGES), np.int32)
        sampling = sampling_batch(rows, VOCAB_SIZE, NUM_SEQS)
        batch = DecodeBatch(counts, counts, counts, counts > 0, table, None, mask)  # type: ignore[arg-type]
        return DecodeCall(batch, sampling, 1, MAX_STEPS, history=_HISTORY.pack_nothing(NUM_SEQS, 0))
    table = kept.batch.table.copy() if number % 8 == 0 else kept.batch.table
    batch = kept.batch._replace(last=counts, cached=counts + 1, num_generated=counts + 2, table=table)  # type: ignore[arg-type]
    return DecodeCall(batch, kept.sampling, 1, MAX_STEPS, history=kept.history)


def measure(num_workers: int, rounds: int, calls: int) -> dict[str, object]:
    """Times all sides alternately.

    Args:
      num_workers: Processes that are driven.
      rounds: Rounds to take.
      calls: Calls of each side in a round.

    Returns:
      Microseconds of each, as JSON takes them.
    """
    own = _IdleExecutor()
    times: dict[str, list[float]] = {name: [] for name in ("empty", "echo", "alone", "driven", "answered")}
    with _driving(num_workers) as channel, _echoing() as bounce:
        executor = DrivenExecutor(own, channel)
        empty = to_message(_EMPTY)
        num_bytes = sum(len(frame) for frame in Encoder().encode(empty))
        call = make_call(0, None)
        executor.allocate_cache(NUM_SEQS, "float32")
        executor.decode((), call)[1].result()
        for _ in range(rounds):
            for name, list_of in times.items():
                for number in range(calls):
                    call = make_call(number, call)
                    begin = time.perf_counter()
                    if name == "empty":
                        channel.ask(empty, _TIMEOUT_S)
                    elif name == "echo":
                        bounce(bytes(num_bytes))
                    elif name == "alone":
                        own.decode((), call)[1].result()
                    else:
                        executor.decode((), call)[1].result()
                        if name == "answered":
                            # Calls are run in order: an answer after it is the end of it.
                            channel.ask(empty, _TIMEOUT_S)
                    list_of.append((time.perf_counter() - begin) * 1e6)
    found: dict[str, object] = {name: _describe(values) for name, values in times.items()}
    extra_us = statistics.median(times["driven"]) - statistics.median(times["alone"])
    return found | {
        "num_workers": num_workers,
        "empty_over_echo": statistics.median(times["empty"]) / statistics.median(times["echo"]),
        "decode_extra_us": extra_us,
        "decode_extra_percent_of_step": extra_us / (STEP_MS * 1000) * 100,
        "decode_extra_p99_percent_of_step": _percentile(times["driven"], 99) / (STEP_MS * 1000) * 100,
    }


@contextlib.contextmanager
def _driving(num_workers: int) -> Iterator[DriverChannel]:
    address = ChannelAddress("127.0.0.1", _free_port(), secrets.token_bytes(32))
    channel = DriverChannel(address, num_workers)
    with _started([(work, (address, rank)) for rank in range(1, num_workers + 1)]):
        channel.wait_for_workers(_TIMEOUT_S)
        channel.wait_until_ready()
        yield channel
        channel.close()


@contextlib.contextmanager
def _echoing() -> Iterator[Callable[[bytes], None]]:
    """A function that sends bytes to another process and back."""
    address = ChannelAddress("127.0.0.1", _free_port(), secrets.token_bytes(32))
    end = End(zmq.ROUTER, address, is_driver=True)
    end.socket.bind(address.endpoint)
    with _started([(echo, (address,))]):
        identity, _ = end.socket.recv_multipart()

        def bounce(data: bytes) -> None:
            end.socket.send_multipart([identity, data])
            end.socket.recv_multipart()

        yield bounce
        end.socket.send_multipart([identity, b""])
    end.close()


@contextlib.contextmanager
def _started(what: Sequence[tuple[Callable[..., None], tuple[object, ...]]]) -> Iterator[None]:
    """Processes, which are killed if they have not ended a while after the end."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=target, args=given, daemon=True) for target, given in what]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.join(5)
            process.kill()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _percentile(values: Sequence[float], share: float) -> float:
    return float(np.percentile(np.asarray(values), share))


def _describe(values: Sequence[float]) -> dict[str, float]:
    return {"median_us": statistics.median(values), "p99_us": _percentile(values, 99)}


def show(found: dict[str, object]) -> None:
    """Prints a measurement for people."""
    print(f"{found['num_workers']} worker(s)      median us   p99 us")
    for name in ("empty", "echo", "alone", "driven", "answered"):
        one = found[name]
        assert isinstance(one, dict)
        print(f"{name:<14} {one['median_us']:>10.0f} {one['p99_us']:>8.0f}")
    percent = found["decode_extra_percent_of_step"]
    assert isinstance(percent, float)
    verdict = "within" if percent <= GOAL_PERCENT else "above"
    print(
        f"a decode call takes {found['decode_extra_us']:.0f} us longer, {percent:.2f} % of a step of {STEP_MS:g} ms: "
        f"{verdict} the goal of {GOAL_PERCENT:g} %"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, and shows what it found."""
    parser = argparse.ArgumentParser(prog="bench_drive", description="What driving other processes costs rank 0.")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 3], metavar="N", help="(default: 1 3)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--calls", type=int, default=400, metavar="N", help="of each side in a round (%(default)s)")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the figures")
    arguments = parser.parse_args(argv)
    before = {"load_average_before": load_average(), "cpu_pressure_before": cpu_pressure()}
    rows = []
    for num_workers in arguments.workers:
        rows.append(measure(num_workers, arguments.rounds, arguments.calls))
        show(rows[-1])
    if arguments.json is not None:
        given = {"rounds": arguments.rounds, "calls": arguments.calls, "libzmq": zmq.zmq_version(), "step_ms": STEP_MS}
        circumstances = conditions() | before | {"cpu_pressure_after": cpu_pressure()} | given
        new = arguments.json.with_name(arguments.json.name + ".new")
        new.write_text(json.dumps({"conditions": circumstances, "drive": rows}, indent=2) + "\n", encoding="utf-8")
        new.replace(arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
