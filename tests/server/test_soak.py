"""Many clients for a while, a third of which disconnect half-way: everything is freed, and memory does not grow."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time

import pytest

from tests.process import anonymous_kib
from tests.server.client import ask
from tests.server.running import PROGRAM, Running, running

NUM_CLIENTS = 32
SECONDS = 180.0
LEAVING = 0.3


def call_until(server: Running, seed: int, end_s: float, counts: list[int], wrong: list[str]) -> None:
    """A client: one request after another, some of which it abandons."""
    dice = random.Random(seed)
    while time.monotonic() < end_s and not wrong:
        stream, is_leaving = dice.random() < 0.7, dice.random() < LEAVING
        body = ask(
            "x" * dice.randrange(400), stream=stream, n=dice.choice([1, 1, 2]), max_tokens=dice.randrange(1, 300)
        )
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
            if is_leaving:
                time.sleep(dice.random() / 20)
                continue
            response = connection.getresponse()
            text = response.read()
            if response.status != 200 or (stream and not text.endswith(b"data: [DONE]\n\n")):
                wrong.append(f"{response.status}: {text[-300:]!r}")
            counts[0] += 1
        finally:
            connection.close()


@pytest.mark.slow  # Three minutes, which is what growth takes to show.
def test_nothing_is_left_behind_and_memory_does_not_grow() -> None:
    with running([str(PROGRAM), json.dumps({"max_num_queued_reqs": 1000})]) as server:
        assert server.process.stdin is not None
        print("load", file=server.process.stdin, flush=True)
        server.wait_for("ready: ")
        end_s, counts, wrong = time.monotonic() + SECONDS, [0], []
        threads = [
            threading.Thread(target=call_until, args=(server, seed, end_s, counts, wrong))
            for seed in range(NUM_CLIENTS)
        ]
        for thread in threads:
            thread.start()
        time.sleep(SECONDS / 2)
        middle = anonymous_kib(server.process.pid)
        for thread in threads:
            thread.join()
        assert not wrong, wrong[:3]
        assert counts[0] > 100
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
            while server.metric(name):
                time.sleep(0.05)
        assert anonymous_kib(server.process.pid) <= 1.02 * middle + 4096
