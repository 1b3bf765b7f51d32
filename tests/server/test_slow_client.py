"""Clients that send slowly, over a real socket: they are told, and others do not wait for them."""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import socket
import time

import pytest

from step3_jax.server.body import read_body
from tests.process import HARD_LIMIT_S
from tests.server.client import ask
from tests.server.conftest import Open
from tests.server.stand_in import serve


def test_a_body_that_comes_a_byte_at_a_time_is_408_and_holds_up_no_other(
    open_client: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A byte a second for a minute, in a sixtieth of the time.
    monkeypatch.setattr("step3_jax.server.exchange.read_body", functools.partial(read_body, arrival_s=1.0))
    with open_client() as client, serve(client.app) as url:
        port = int(url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), HARD_LIMIT_S) as slow:
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            slow.sendall(f"{head}Content-Length: 10000\r\n\r\n".encode())
            quick = http.client.HTTPConnection("127.0.0.1", port, timeout=HARD_LIMIT_S)
            quick.request("POST", "/v1/chat/completions", json.dumps(ask()), {"Content-Type": "application/json"})
            assert quick.getresponse().status == 200
            quick.close()
            slow.settimeout(1 / 60)
            reply, end_s = b"", time.monotonic() + HARD_LIMIT_S
            while not reply and time.monotonic() < end_s:
                slow.sendall(b"x")
                with contextlib.suppress(TimeoutError):
                    reply = slow.recv(65_536)
            assert reply.startswith(b"HTTP/1.1 408 ")
            assert b'"code":"request_timeout"' in reply
            assert b"connection: close" in reply.lower()
        assert client.service.admission.num_requests == 0
