"""Many clients load the service for as long as you like: is every request answered, and is everything freed again?

    python -m tools.soak_service --minutes 60 --json benchmarks/service.json

Starts `step3 serve` with the shipped model. Clients ask for streams and for complete answers: chats, images, long
prompts, sampled with several completions. They abandon some of them after a number of chunks, or by a time-out that may
strike before the first. Then it waits until the service is idle. It exits with 1 unless every request that was not
abandoned got a complete answer or a refusal with `Retry-After`, nothing runs, waits or holds pages at the end, no
program was compiled meanwhile, and the anonymous memory of the last quarter is within 2 % of that of the quarter
before.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import collections
import contextlib
import json
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator

import httpx2
from prometheus_client.parser import text_string_to_metric_families

from step3_jax import resources
from step3_jax.bench.machine import anonymous_bytes, conditions
from step3_jax.bench.report import format_report, write_section

MEMORY_TOLERANCE = 0.02
SAMPLE_S = 10.0
IDLE_S = 30.0
START_S = 300.0
QUESTIONS = (
    "What is the capital of France?",
    "What is the capital of Japan?",
    "Tell me about the sun.",
    "Write a sentence about a river.",
)


class Left(Exception):
    """The client abandons its request."""


@contextlib.contextmanager
def running_service(port: int, log: pathlib.Path) -> Iterator[subprocess.Popen[bytes]]:
    """`step3 serve` with the shipped model until the block ends; killed if it does not exit by itself."""
    command = [sys.executable, "-m", "step3_jax.cli.main", "serve", "--port", str(port)]
    with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


async def read_metrics(client: httpx2.AsyncClient) -> dict[str, float]:
    """Values of the service's metrics, summed over their labels."""
    found: dict[str, float] = collections.defaultdict(float)
    for family in text_string_to_metric_families((await client.get("/metrics")).text):
        for sample in family.samples:
            found[sample.name] += sample.value
    return found


def make_body(rng: random.Random, images: list[str]) -> dict[str, object]:
    """A request of one of several kinds."""
    question: object = rng.choice(QUESTIONS)
    kind = rng.random()
    body: dict[str, object] = {
        "model": "step3-tiny",
        "max_tokens": rng.choice((8, 32, 128)),
        "stream": rng.random() < 0.8,
    }
    if kind < 0.2:
        image = {"type": "image_url", "image_url": {"url": rng.choice(images)}}
        question = [image, {"type": "text", "text": "What is this?"}]
    elif kind < 0.4:
        question = f"{question} " + "The river is long. " * rng.randrange(20, 120)
    elif kind < 0.6:
        body |= {"temperature": 1.2, "seed": rng.randrange(1000), "n": 2, "logprobs": True, "top_logprobs": 2}
    elif kind < 0.7:
        body |= {"presence_penalty": 0.5, "stop": ["river"], "top_p": 0.9}
    return body | {"messages": [{"role": "user", "content": question}]}


async def read_stream(response: httpx2.Response, max_chunks: int) -> AsyncIterator[str]:
    """Events of a stream; raises `Left` after so many."""
    count = 0
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            yield line[len("data: ") :]
            count += 1
            if count >= max_chunks:
                raise Left


async def ask(client: httpx2.AsyncClient, body: dict[str, object], max_chunks: int) -> str:
    """Sends one request and returns how it ended: "answered", "refused", or what went wrong."""
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code == 503 and "retry-after" in response.headers:
            return "refused"
        if response.status_code != 200:
            await response.aread()
            return f"status {response.status_code}: {response.text[:200]}"
        if not body["stream"]:
            await response.aread()
            ends = [choice["finish_reason"] for choice in response.json()["choices"]]
            return "answered" if len(ends) == body.get("n", 1) and all(ends) else f"ended with {ends}"
        num_ended, last = 0, ""
        async for last in read_stream(response, max_chunks):
            if last == "[DONE]":
                break
            event = json.loads(last)
            if "error" in event:
                return f"error event: {last[:200]}"
            num_ended += sum(choice["finish_reason"] is not None for choice in event["choices"])
        return "answered" if last == "[DONE]" and num_ended == body.get("n", 1) else f"cut off after {last[:100]!r}"


async def run_client(
    client: httpx2.AsyncClient,
    seed: int,
    end_s: float,
    cancels: float,
    images: list[str],
    counts: collections.Counter[str],
) -> None:
    """One client: request after request until the time is up."""
    rng = random.Random(seed)
    while time.monotonic() < end_s:
        body = make_body(rng, images)
        leaves = rng.random() < cancels
        by_time = leaves and rng.random() < 0.5
        max_chunks = rng.randrange(1, 12) if leaves and not by_time else sys.maxsize
        counts["asked"] += 1
        try:
            async with asyncio.timeout(rng.uniform(0.0, 3.0) if by_time else 300.0):
                counts[await ask(client, body, max_chunks)] += 1
        except (Left, TimeoutError):
            counts["left" if leaves else "silent for 300 s"] += 1
        except httpx2.HTTPError as error:
            counts[f"{type(error).__name__}: {error}"] += 1


async def soak(url: str, pid: int, *, minutes: float, num_clients: int, cancels: float) -> dict[str, object]:
    """Runs the load and returns what was counted and measured."""
    folder = resources.find("models/step3-tiny") / "examples"
    images = [
        f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}" for path in sorted(folder.glob("*.png"))
    ]
    limits = httpx2.Limits(max_connections=num_clients + 4)
    async with httpx2.AsyncClient(base_url=url, timeout=None, limits=limits) as client:
        start = await wait_for_start(client)
        begin_s = time.monotonic()
        end_s = begin_s + minutes * 60
        counts: collections.Counter[str] = collections.Counter()
        memory: list[int] = []

        async def sample() -> None:
            while time.monotonic() < end_s:
                memory.append(anonymous_bytes(pid) or 0)
                await asyncio.sleep(min(SAMPLE_S, max(0.1, minutes * 60 / 40)))

        clients = (run_client(client, seed, end_s, cancels, images, counts) for seed in range(num_clients))
        await asyncio.gather(sample(), *clients)
        end = await wait_for_idle(client)
    quarter = max(1, len(memory) // 4)
    third, last = statistics.median(memory[-2 * quarter : -quarter]), statistics.median(memory[-quarter:])
    return {
        "minutes": minutes,
        "clients": num_clients,
        "cancels": cancels,
        "requests": dict(counts),
        "generated_tokens": int(end["step3:generation_tokens_total"] - start["step3:generation_tokens_total"]),
        "compilations": int(end["step3:compilations_total"] - start["step3:compilations_total"]),
        "preemptions": int(end["step3:num_preemptions_total"]),
        "running_at_end": int(end["step3:num_requests_running"]),
        "waiting_at_end": int(end["step3:num_requests_waiting"]),
        "cache_use_at_end": end["step3:kv_cache_usage_perc"],
        "anonymous_mib": [round(value / 2**20) for value in memory[:: max(1, len(memory) // 12)]],
        "anonymous_growth": round(last / third - 1, 4),
    }


async def wait_for_start(client: httpx2.AsyncClient) -> dict[str, float]:
    """Waits until the service is healthy and returns its metrics."""
    for _ in range(int(START_S / 0.5)):
        with contextlib.suppress(httpx2.HTTPError):
            if (await client.get("/health")).status_code == 200:
                return await read_metrics(client)
        await asyncio.sleep(0.5)
    raise RuntimeError(f"the service was not healthy within {START_S:.0f} s")


async def wait_for_idle(client: httpx2.AsyncClient) -> dict[str, float]:
    """Waits until nothing runs, for at most `IDLE_S`, and returns the metrics."""
    for _ in range(int(IDLE_S / 0.5)):
        found = await read_metrics(client)
        if not found["step3:num_requests_running"] and not found["step3:num_requests_waiting"]:
            break
        await asyncio.sleep(0.5)
    return found


def find_problems(found: dict[str, object]) -> list[str]:
    """What is wrong with the result."""
    counts = found["requests"]
    assert isinstance(counts, dict)
    problems = [
        f"{number} x {what}" for what, number in counts.items() if what not in ("asked", "answered", "left", "refused")
    ]
    if counts["asked"] != sum(number for what, number in counts.items() if what != "asked"):
        problems.append("requests are missing")
    for name in ("compilations", "running_at_end", "waiting_at_end", "cache_use_at_end"):
        if found[name]:
            problems.append(f"{name} is {found[name]}")
    growth = found["anonymous_growth"]
    if isinstance(growth, float) and growth > MEMORY_TOLERANCE:
        problems.append(f"memory grew by {growth:.1%} in the second half")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--cancels", type=float, default=0.3, help="share of requests that their client abandons")
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--json", help="file to add the figures to, next to those of other benchmarks")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        log = pathlib.Path(folder) / "service.log"
        with running_service(arguments.port, log) as process:
            url = f"http://127.0.0.1:{arguments.port}"
            try:
                found = asyncio.run(
                    soak(
                        url,
                        process.pid,
                        minutes=arguments.minutes,
                        num_clients=arguments.clients,
                        cancels=arguments.cancels,
                    )
                )
            except Exception:
                print(log.read_text(errors="replace")[-3000:], file=sys.stderr)
                raise
        found |= {"exit_code": process.returncode, "conditions": conditions()}
    if arguments.json:
        write_section(arguments.json, "soak", found)
    print(format_report(found))
    problems = find_problems(found)
    if process.returncode:
        problems.append(f"the service exited with {process.returncode}")
    for problem in problems:
        print(f"soak: {problem}", file=sys.stderr)
    return bool(problems)


if __name__ == "__main__":
    raise SystemExit(main())
