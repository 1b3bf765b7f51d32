"""The process of the service: it listens before it loads, drains, and never outlives its engine."""

from __future__ import annotations

import contextlib
import http.client
import json
import pathlib
import random
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from step3_jax.server.config import ServerConfig
from step3_jax.server.process import open_socket
from tests.process import HARD_LIMIT_S, ROOT, environment, free_port
from tests.server.client import ask
from tests.server.running import PROGRAM, Running, running

CHAT = "/v1/chat/completions"


@contextlib.contextmanager
def served(**config: object) -> Iterator[Running]:
    with running([str(PROGRAM), json.dumps(config)]) as server:
        yield server


def tell(server: Running, command: str) -> None:
    assert server.process.stdin is not None
    print(command, file=server.process.stdin, flush=True)
    server.wait_for(f"did {command}")


def load(server: Running) -> None:
    tell(server, "load")
    server.wait_for("ready: ")


def begin_stream(server: Running) -> http.client.HTTPResponse:
    """A stream whose first event has arrived."""
    response = server.begin(CHAT, ask(stream=True))
    assert b'"role":"assistant"' in response.readline()
    return response


def test_it_listens_before_the_model_is_there_and_drains_when_told_to_end() -> None:
    with served() as server:
        assert server.ask("/live") == (200, {"status": "ok"})
        assert server.ask("/health") == (503, {"status": "starting"})
        assert server.ask(CHAT, ask())[0] == 503
        load(server)
        assert server.ask("/health") == (200, {"status": "ok"})
        tell(server, "hold")
        stream = begin_stream(server)
        idle = server.send("/live")
        assert idle.getresponse().read()
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("shutting down: 1 request")
        assert server.ask("/health") == (503, {"status": "draining"})
        assert server.ask(CHAT, ask())[1]["error"]["code"] == "shutting_down"
        tell(server, "go")
        assert stream.read().endswith(b"data: [DONE]\n\n")
        assert server.wait() == 0
        assert idle.sock is not None
        assert idle.sock.recv(1) == b"", "idle connections are closed"
        assert "has_threads=False" in server.said
        assert "frozen=True, collects=True" in server.said, (
            "the collector leaves out what was there before the first request"
        )


def test_what_does_not_end_in_time_gets_an_error_and_the_process_ends() -> None:
    with served(shutdown_timeout=0.3) as server:
        load(server)
        tell(server, "hold")
        stream = begin_stream(server)
        server.process.send_signal(signal.SIGINT)
        assert b'"code":"shutting_down"' in stream.read()
        tell(server, "go")
        assert server.wait() == 0


def test_a_second_signal_ends_it_at_once() -> None:
    with served(shutdown_timeout=10_000) as server:
        load(server)
        tell(server, "hold")
        stream = begin_stream(server)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("shutting down")
        server.process.send_signal(signal.SIGTERM)
        assert b'"code":"shutting_down"' in stream.read()
        tell(server, "go")
        assert server.wait() == 0


def test_a_signal_while_the_model_is_loaded_ends_it() -> None:
    with served() as server:
        assert server.ask("/live")[0] == 200
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
        assert "has_threads=True" in server.said


def test_a_model_that_cannot_be_loaded_ends_it_with_the_reason() -> None:
    with served() as server:
        tell(server, "fail")
        assert server.wait() == 1
        assert "the weights are damaged" in server.said


def test_a_dead_engine_is_told_to_every_client_and_ends_the_process_with_70() -> None:
    with served() as server:
        load(server)
        tell(server, "hold")
        stream = begin_stream(server)
        whole = server.send(CHAT, ask())
        tell(server, "die")
        body = stream.read()
        assert b'data: {"error":' in body
        assert b"[DONE]" not in body
        assert whole.getresponse().status in (500, 503)
        assert server.wait() == 70


def test_an_address_that_is_taken_is_told_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port {port}: .*choose another"):
            open_socket(ServerConfig(port=port))
    with pytest.raises(ValueError, match="nowhere"):
        open_socket(ServerConfig(host="nowhere.invalid"))


@pytest.mark.slow  # An operating system process of its own, for what seldom changes.
def test_a_full_disk_for_the_log_does_not_hold_up_answers() -> None:
    port = free_port()
    with (
        pathlib.Path("/dev/full").open("w") as full,
        subprocess.Popen(
            [sys.executable, str(PROGRAM), json.dumps({"port": port})],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.PIPE,
            stderr=full,
            text=True,
        ) as process,
    ):
        try:
            assert process.stdin is not None
            print("load", file=process.stdin, flush=True)
            wait_until_healthy(port, process)
            for _ in range(20):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=HARD_LIMIT_S)
                connection.request("POST", CHAT, json.dumps(ask()), {"Content-Type": "application/json"})
                assert connection.getresponse().status == 200
                connection.close()
            process.send_signal(signal.SIGTERM)
            assert process.wait(HARD_LIMIT_S) == 0
        finally:
            process.kill()


def wait_until_healthy(port: int, process: subprocess.Popen[str]) -> None:
    """Asks until it is healthy; stops waiting if the process ends."""
    deadline = time.monotonic() + HARD_LIMIT_S
    while time.monotonic() < deadline and process.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=HARD_LIMIT_S)
        with contextlib.suppress(ConnectionError):
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                connection.close()
                return
        connection.close()
        time.sleep(0.05)
    pytest.fail(f"it never became healthy; exit code {process.poll()}")


@pytest.mark.slow
def test_killed_at_any_moment_it_starts_again_on_the_same_port() -> None:
    """Fifty starts of a process, two seconds each."""
    port, dice = free_port(), random.Random(0)
    for number in range(50):
        with running([str(PROGRAM), json.dumps({"port": port})]) as server:
            tell(server, "load")
            if number % 2:
                server.wait_for("ready: ")
                server.send(CHAT, ask(stream=True))
            time.sleep(dice.random() / 2)
            server.process.kill()
            assert server.wait() == -signal.SIGKILL
    with running([str(PROGRAM), json.dumps({"port": port})]) as server:
        load(server)
        assert server.ask(CHAT, ask())[0] == 200


@pytest.mark.slow  # As above.
def test_tls(tmp_path: object) -> None:
    key, certificate = f"{tmp_path}/key.pem", f"{tmp_path}/cert.pem"
    made = subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate),
            *("-days", "1", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"),
        ],
        capture_output=True,
        check=False,
    )
    if made.returncode:
        pytest.skip("openssl is not there to make a certificate")
    with served(ssl_keyfile=key, ssl_certfile=certificate) as server:
        context = ssl.create_default_context(cafile=certificate)
        connection = http.client.HTTPSConnection("localhost", server.port, context=context, timeout=60)
        connection.request("GET", "/live")
        assert connection.getresponse().status == 200
        connection.close()
