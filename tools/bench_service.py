"""What the service costs over the engine alone, in one run: starts, throughput, first token, overload, idle sockets.

    python -m tools.bench_service --json benchmarks/service.json

The model is that of `step3 bench` with random weights. One process serves it, a second one sends requests,
and this one runs the same requests through `LLM.generate`, alternating with the other two. All are on the same cores: the
clients' work takes time from the engine, and the processor seconds of each say how much. Other services, such as that of
`tools/llama_cpp_server.py`, can be measured alongside with `--peer`.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence

import httpx2
import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse

from step3_jax.bench.load import Load, Record, run_load
from step3_jax.bench.machine import anonymous_bytes, conditions, cpu_pressure, load_average
from step3_jax.bench.model import bench_config, random_model
from step3_jax.bench.report import format_report, write_section
from step3_jax.bench.serve import find_waits, summarise
from step3_jax.bench.workload import draw_lengths, random_prompts, word_tokenizer
from step3_jax.cli.arguments.bench import PRESETS
from step3_jax.client import ServiceClient
from step3_jax.engine.compile_cache import FOLDER_VARIABLE
from step3_jax.engine.llm import LLM
from step3_jax.sampling.params import SamplingParams
from step3_jax.server.app import build_app
from step3_jax.server.config import ServerConfig

CLIENTS = 32
# As many requests may wait as run, so that an overload of a minute fills the queue.
QUEUED = 2 * CLIENTS
PROMPT, OUTPUT = (32, 256), (32, 128)
OVERLOAD = 1.5
IDLE_CONNECTIONS = 1000
START_S = 600


def make_llm(arguments: argparse.Namespace) -> LLM:
    """The model, with a tokenizer whose ids are words."""
    config = bench_config(*PRESETS[arguments.preset])
    given = {"max_num_batched_tokens": arguments.max_num_batched_tokens} if arguments.max_num_batched_tokens else {}
    return LLM.from_model(random_model(config), word_tokenizer(config.text.vocab_size), max_num_seqs=CLIENTS, **given)


def make_bodies(count: int, vocab_size: int, seed: int, output: tuple[int, int] = OUTPUT) -> list[dict[str, object]]:
    """Requests of token ids; no two start alike."""
    lengths = draw_lengths(count, PROMPT, output, seed=seed)
    common = {"temperature": 0, "ignore_eos": True, "stream_options": {"include_usage": True}}
    return [
        common | {"prompt": ids, "max_tokens": one.output}
        for ids, one in zip(random_prompts(lengths, vocab_size, seed=seed), lengths, strict=True)
    ]


def serve(arguments: argparse.Namespace) -> int:
    """The process with the service."""
    llm = make_llm(arguments)
    llm.warm_up()
    app = build_app(llm, ServerConfig(max_num_queued_reqs=QUEUED))

    async def seconds(_: Request) -> JSONResponse:
        return JSONResponse(thread_seconds())

    app.add_route("/cpu-seconds", seconds)
    uvicorn.run(app, port=arguments.port, log_level="warning", access_log=False)
    return 0


def thread_seconds() -> dict[str, float]:
    """Processor seconds of this process: the event loop's thread, the engine's, and all others (which compute)."""
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    found = {"event_loop": 0.0, "engine": 0.0, "others": 0.0}
    for task in pathlib.Path("/proc/self/task").iterdir():
        fields = (task / "stat").read_text().rpartition(")")[2].split()
        name = names.get(int(task.name), "")
        key = {"MainThread": "event_loop", "step3-engine": "engine"}.get(name, "others")
        found[key] += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return found


def send(arguments: argparse.Namespace) -> int:
    """The clients' process: reads a load from standard input, writes the records to standard output."""
    given = json.load(sys.stdin)

    async def run() -> list[Record]:
        async with ServiceClient(given["url"]) as client:
            return await run_load(client, "completions", given["bodies"], Load(given["concurrency"], given["rate"]))

    begin = time.process_time()
    records = asyncio.run(run())
    print(json.dumps({"cpu_s": time.process_time() - begin, "records": [vars(one) for one in records]}))
    return 0


def send_apart(
    url: str, bodies: Sequence[Mapping[str, object]], *, concurrency: int | None = None, rate: float | None = None
) -> tuple[list[Record], float]:
    """Sends a load from a separate process; returns the records and that process's processor seconds."""
    given = json.dumps({"url": url, "bodies": bodies, "concurrency": concurrency, "rate": rate})
    command = [sys.executable, "-m", "tools.bench_service", "--role", "send"]
    done = subprocess.run(command, input=given, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout)
    return [Record(**one) for one in found["records"]], found["cpu_s"]


@contextlib.contextmanager
def running_service(arguments: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """The service in a separate process: its URL and process id."""
    command = [sys.executable, "-m", "tools.bench_service", "--role", "serve"]
    command += ["--preset", arguments.preset, "--max-num-batched-tokens", str(arguments.max_num_batched_tokens)]
    with _started(command) as started:
        yield started


@contextlib.contextmanager
def _started(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Iterator[tuple[str, int]]:
    """A service that is ready, on a port that was free: its URL and process id."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen([*command, "--port", str(port)], env=environment) as process:
        try:
            deadline = time.monotonic() + START_S
            while True:
                with contextlib.suppress(httpx2.HTTPError):
                    if httpx2.get(f"{url}/health").status_code == 200:
                        break
                if process.poll() is not None:
                    raise RuntimeError(f"the service exited with {process.returncode}")
                if time.monotonic() > deadline:
                    raise RuntimeError(f"the service was not ready after {START_S} s")
                time.sleep(0.1)
            yield url, process.pid
        finally:
            process.kill()


def generate_seconds(llm: LLM, bodies: Sequence[Mapping[str, object]]) -> float:
    """Seconds of `LLM.generate` for the same requests, without compiling."""
    params = [SamplingParams(temperature=0, max_tokens=int(str(one["max_tokens"])), ignore_eos=True) for one in bodies]
    compile_s, begin = llm.stats.compile_s, time.perf_counter()
    outputs = llm.generate([one["prompt"] for one in bodies], params, use_tqdm=False)  # type: ignore[arg-type]
    assert all(output.error is None for output in outputs)
    return time.perf_counter() - begin - (llm.stats.compile_s - compile_s)


def measure_throughput(arguments: argparse.Namespace, llm: LLM, url: str) -> list[dict[str, object]]:
    """Rows: tokens per second through HTTP and through `LLM.generate`, and whose processor seconds they took."""
    rows = []
    for number in range(arguments.rounds):
        bodies = make_bodies(arguments.requests, llm.config.text.vocab_size, number)
        offline_s = 0.0
        if number % 2:
            offline_s = generate_seconds(llm, bodies)
        before = httpx2.get(f"{url}/cpu-seconds").json()
        records, clients_s = send_apart(url, bodies, concurrency=CLIENTS)
        after = httpx2.get(f"{url}/cpu-seconds").json()
        offline_s = offline_s or generate_seconds(llm, bodies)
        found = summarise(records, {})
        assert found["answered"] == len(bodies), found["errors"]
        tokens, duration = float(str(found["output_tokens"])), float(str(found["duration_s"]))
        row: dict[str, object] = {
            "service_tokens_per_s": tokens / duration,
            "generate_tokens_per_s": tokens / offline_s,
            "ratio": offline_s / duration,
            "seconds": duration,
        }
        for name, peer in (one.split("=", 1) for one in arguments.peer):
            answers = summarise(send_apart(peer, bodies, concurrency=CLIENTS)[0], {})
            assert answers["answered"] == len(bodies), (name, answers["errors"])
            row[f"{name}_tokens_per_s"] = float(str(answers["output_tokens"])) / float(str(answers["duration_s"]))
        row |= {f"{name}_cpu_s": after[name] - before[name] for name in before} | {"clients_cpu_s": clients_s}
        rows.append(row)
    return rows


def measure_first_token(arguments: argparse.Namespace, llm: LLM, url: str) -> dict[str, object]:
    """Milliseconds to the first token, one request at a time: through HTTP, through `LLM.generate`, and the difference."""
    pairs = []
    for number in range(arguments.first_tokens + 2):
        (body,) = make_bodies(1, llm.config.text.vocab_size, 1000 + number, output=(4, 4))
        record = asyncio.run(_send_one(url, body))
        waits = find_waits(record)
        assert waits is not None, record.error
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        begin = time.perf_counter()
        stream = iter(llm.generate(body["prompt"], params, stream=True))  # type: ignore[call-overload]
        next(stream)
        pairs.append((waits.first, (time.perf_counter() - begin) * 1e3))
        # Read to its end: a call still running would take time from the next request.
        collections.deque(stream, maxlen=0)
    pairs = pairs[2:]
    through, alone = zip(*pairs, strict=True)
    return {
        "through_http_ms": statistics.median(through),
        "generate_ms": statistics.median(alone),
        "added_ms": statistics.median(first - second for first, second in pairs),
    }


async def _send_one(url: str, body: Mapping[str, object]) -> Record:
    async with ServiceClient(url) as client:
        # In real use the connection already exists.
        await client.list_models()
        (record,) = await run_load(client, "completions", [body], Load(1))
        return record


def measure_overload(arguments: argparse.Namespace, llm: LLM, url: str) -> dict[str, object]:
    """A closed loop, which finds the capacity, then an open loop at 1.5 times the capacity."""
    # All sequences wait for a chunk of prompts at once: the 99th percentile over few requests would be chance.
    bodies = make_bodies(arguments.requests * 3, llm.config.text.vocab_size, 2000)
    records, _ = send_apart(url, bodies, concurrency=CLIENTS)
    closed = summarise(records, {})
    capacity = float(str(closed["requests_per_s"]))
    bodies = make_bodies(arguments.requests * 3, llm.config.text.vocab_size, 3000)
    records, _ = send_apart(url, bodies, rate=OVERLOAD * capacity)
    opened = summarise(records, {})

    def between(found: Mapping[str, object]) -> float:
        rows = found["waits_ms"]
        assert isinstance(rows, list)
        return float(next(row["p99"] for row in rows if row["of"] == "between tokens"))

    return {
        "capacity_requests_per_s": capacity,
        "offered_requests_per_s": OVERLOAD * capacity,
        "answered": opened["answered"],
        "errors": opened["errors"],
        "p99_between_tokens_ms_at_capacity": between(closed),
        "p99_between_tokens_ms_overloaded": between(opened),
        "ratio": between(opened) / between(closed),
        "waits_ms": opened["waits_ms"],
    }


def measure_idle(url: str, pid: int, count: int) -> dict[str, object]:
    """Memory of the service for each idle connection, each of which has been used once."""
    before = anonymous_bytes(pid) or 0
    host, port = url.removeprefix("http://").split(":")
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(count)]
        for one in connections:
            one.sendall(b"GET /live HTTP/1.1\r\nHost: here\r\n\r\n")
        for one in connections:
            assert one.recv(65536).startswith(b"HTTP/1.1 200")
        each = ((anonymous_bytes(pid) or 0) - before) / count
        begin = time.perf_counter()
        assert httpx2.get(f"{url}/health").status_code == 200
    return {"connections": count, "kib_each": each / 1024, "health_ms_meanwhile": (time.perf_counter() - begin) * 1e3}


def measure_starts() -> dict[str, float]:
    """Seconds until `step3 serve` with the shipped model is ready: with an empty compile cache, then with what that left."""
    command = [sys.executable, "-m", "step3_jax.cli.main", "serve", "--log-level", "warning"]
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("cold_s", "cached_s"):
            begin = time.perf_counter()
            with _started(command, {**os.environ, FOLDER_VARIABLE: folder}):
                found[name] = time.perf_counter() - begin
    return found


def measure(arguments: argparse.Namespace) -> int:
    """Runs everything, prints it and writes it."""
    before = {"load_average_before": load_average(), "cpu_pressure_before": cpu_pressure()}
    begin = time.perf_counter()
    found: dict[str, object] = {"clients": CLIENTS, "requests": arguments.requests}

    def tell(what: str) -> None:
        print(f"{time.perf_counter() - begin:5.0f} s: {what}", file=sys.stderr, flush=True)

    if not arguments.only_throughput:
        tell("starting step3 serve, twice")
        found["start"] = measure_starts()
    tell("making the model")
    llm = make_llm(arguments)
    llm.warm_up()
    tell("starting the service")
    with running_service(arguments) as (url, pid):
        tell(f"throughput, {arguments.rounds} rounds")
        rows = measure_throughput(arguments, llm, url)
        found["throughput_ratio"] = statistics.median(float(str(row["ratio"])) for row in rows)
        found["throughput"] = rows
        if not arguments.only_throughput:
            tell("first token")
            found["first_token"] = measure_first_token(arguments, llm, url)
            tell("overload")
            found["overload"] = measure_overload(arguments, llm, url)
            tell("idle connections")
            found["idle"] = measure_idle(url, pid, IDLE_CONNECTIONS)
    machine = conditions() | before | {"cpu_pressure_after": cpu_pressure()}
    found = {"conditions": machine | {"preset": arguments.preset}} | found
    if arguments.json:
        write_section(arguments.json, "throughput" if arguments.only_throughput else "service", found)
    print(format_report(found))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=96, help="requests per round")
    parser.add_argument("--first-tokens", type=int, default=40, help="requests for the first-token measurement")
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=URL",
        help="another service that gets the same requests, alternating with this one",
    )
    parser.add_argument(
        "--only-throughput",
        action="store_true",
        help="no more than that, written as `throughput`, to compare with peers",
    )
    parser.add_argument("--preset", choices=PRESETS, default="100m", help="size of the model (default: %(default)s)")
    parser.add_argument(
        "--max-num-batched-tokens", type=int, default=0, help="as in `step3 serve` (default: what that takes)"
    )
    parser.add_argument("--json", help="file to add the figures to, next to those of other benchmarks")
    parser.add_argument("--role", choices=("measure", "serve", "send"), default="measure", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    return {"measure": measure, "serve": serve, "send": send}[arguments.role](arguments)


if __name__ == "__main__":
    raise SystemExit(main())
