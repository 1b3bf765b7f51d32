"""`step3 bench serve`: puts load on a service; the figures go to tables, a file and a plot."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence

from tqdm import tqdm

from step3_jax.bench.dataset import LoadRequest, make_requests, read_requests
from step3_jax.bench.load import Load, Record, run_load
from step3_jax.bench.machine import conditions, cpu_pressure, load_average
from step3_jax.bench.plot import draw_waits, require_plot
from step3_jax.bench.report import format_report, write_section
from step3_jax.bench.serve import summarise
from step3_jax.bench.workload import draw_lengths
from step3_jax.cli.process import interruptible
from step3_jax.cli.remote_option import read_key
from step3_jax.client import ServiceClient, ServiceError

_CONCURRENCY = 8
_REQUESTS = 64


def run(arguments: argparse.Namespace) -> int:
    """Sends the load, and prints the figures.

    Returns:
      0, or 1 if nothing was answered.

    Raises:
      ValueError: For options that do not go together, or a dataset that cannot be read.
      ServiceError: If the service cannot be reached, or refuses the first requests.
    """
    is_closed = arguments.rate is None
    concurrency = (_CONCURRENCY if arguments.concurrency is None else arguments.concurrency) if is_closed else None
    load = Load(concurrency, arguments.rate, arguments.seed)
    if arguments.plot:
        require_plot()
    requests = _read(arguments)
    client_s = time.process_time()
    before = {"load_average_before": load_average(), "cpu_pressure_before": cpu_pressure()}
    with interruptible():
        model, records = asyncio.run(_measure(arguments, load, requests))
    given = {
        "url": arguments.url,
        "model": model,
        "endpoint": arguments.endpoint,
        "concurrency": load.concurrency,
        "rate": load.rate,
        "seed": arguments.seed,
        "extra_body": arguments.extra_body,
        # On the same machine, the load generator takes this much from the service.
        "client_cpu_s": time.process_time() - client_s,
    }
    machine = conditions() | before | {"cpu_pressure_after": cpu_pressure()}
    found: dict[str, object] = {"conditions": machine | given} | summarise(records, arguments.goodput)
    print(format_report(found))
    if arguments.json:
        write_section(arguments.json, "serve", found)
    if arguments.plot:
        how = f"{load.concurrency} at a time" if load.rate is None else f"{load.rate:g} per second"
        draw_waits(records, pathlib.Path(arguments.plot), f"{model}: {len(records)} requests, {how}")
    return 0 if found["answered"] else 1


def _read(arguments: argparse.Namespace) -> list[LoadRequest]:
    """The requests, starting with those of the warm-up. A file that is too short is repeated."""
    count, warm_up = arguments.requests, arguments.warm_up
    if (count is not None and count < 1) or warm_up < 0:
        raise ValueError(f"--requests {count} and --warm-up {warm_up}: at least 1 and 0 are needed")
    if arguments.dataset:
        found = read_requests(arguments.dataset, seed=arguments.seed)
        return list(itertools.islice(itertools.cycle(found), (len(found) if count is None else count) + warm_up))
    lengths = draw_lengths(
        (_REQUESTS if count is None else count) + warm_up,
        arguments.prompt_tokens,
        arguments.output_tokens,
        seed=arguments.seed,
    )
    return make_requests(lengths, seed=arguments.seed)


async def _measure(
    arguments: argparse.Namespace, load: Load, requests: Sequence[LoadRequest]
) -> tuple[str, list[Record]]:
    async with ServiceClient(arguments.url, api_key=read_key(arguments), timeout_s=arguments.timeout) as client:
        model = arguments.served_model or (await client.list_models())[0]
        bodies: list[Mapping[str, object]] = [
            one.body(model, arguments.endpoint, arguments.extra_body) for one in requests
        ]
        path, warm_up = arguments.endpoint, arguments.warm_up
        if warm_up:
            first = await run_load(client, path, bodies[:warm_up], Load(concurrency=1))
            refused = next((one.error for one in first if one.error is not None), None)
            if refused is not None:
                # The reason is more useful than a table of refusals.
                async for _ in client.stream(path, bodies[0]):
                    pass
                raise ServiceError(f"a request of the warm-up was not answered: {refused}", refused)
        with tqdm(total=len(bodies) - warm_up, unit="request", disable=not sys.stderr.isatty()) as bar:
            return model, await run_load(client, path, bodies[warm_up:], load, tell=lambda _: bar.update())
