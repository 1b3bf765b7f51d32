"""The shipped nginx file in front of a service: streams pass through at once, and a disconnected client is noticed."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import pathlib
import re
import shutil
import subprocess
import time
from collections.abc import Iterator

import pytest

from step3_jax import resources
from tests.process import free_port
from tests.server.stand_in import StandIn, serve

PROGRAM = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="nginx is not installed (Debian: apt-get install nginx-light)")
LIMIT_S = 30.0

MAIN = """
{user} daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 64; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    include {folder}/step3.conf;
}}
"""


@contextlib.contextmanager
def proxy(folder: pathlib.Path, behind: str) -> Iterator[int]:
    """nginx with the shipped file, but on its own port and without TLS; yields the port."""
    port = free_port()
    text = resources.find("configs/serve/nginx.conf").read_text(encoding="utf-8")
    text = text.replace("127.0.0.1:8000", behind.removeprefix("http://"))
    text, num_listening = re.subn(r"listen 443 ssl;", f"listen 127.0.0.1:{port};", text)
    text, num_files = re.subn(r"ssl_certificate\S* \S+;", "", text)
    assert (num_listening, num_files) == (1, 2)
    # Its workers would be a different user, which may not read the test's folder.
    user = "user root;" if os.geteuid() == 0 else ""
    (folder / "step3.conf").write_text(text, encoding="utf-8")
    (folder / "nginx.conf").write_text(MAIN.format(folder=folder, user=user), encoding="utf-8")
    command = [str(PROGRAM), "-p", str(folder), "-e", str(folder / "error.log"), "-c", str(folder / "nginx.conf")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until(lambda: (folder / "pid").exists() or process.poll() is not None)
            assert process.poll() is None, process.communicate()[1]
            yield port
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            process.kill()


def wait_until(condition: object) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[StandIn, int]]:
    service = StandIn()
    with serve(service.app()) as url, proxy(tmp_path_factory.mktemp("nginx"), url) as port:
        yield service, port


def begin(port: int, body: bytes | None = None) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
    data = json.dumps({"stream": True, "messages": []}).encode() if body is None else body
    connection.request("POST", "/v1/chat/completions", data, {"Content-Type": "application/json"})
    return connection


def test_pieces_pass_as_they_come_and_leaving_is_noticed(served: tuple[StandIn, int]) -> None:
    service, port = served
    service.content, service.delay_s = ("more ",) * 5000, 0.01
    connection = begin(port)
    response = connection.getresponse()
    while b"more" not in response.readline():
        pass
    assert service.num_running == 1, "the first piece is here, and the answer is far from its end"
    response.close()
    connection.close()
    wait_until(lambda: service.num_running == 0)


def test_a_whole_stream_is_whole(served: tuple[StandIn, int]) -> None:
    service, port = served
    service.content, service.delay_s = ("a", "b"), 0.0
    connection = begin(port)
    text = connection.getresponse().read().decode()
    connection.close()
    assert text.endswith("data: [DONE]\n\n")
    assert text.startswith(": keep-alive\n\n")


def test_a_body_of_the_services_own_limit_passes_and_a_larger_one_does_not(served: tuple[StandIn, int]) -> None:
    _, port = served
    for size, status in ((32 * 2**20, 200), (32 * 2**20 + 1, 413)):
        body = json.dumps({"stream": True, "messages": []}).encode()
        connection = begin(port, body + b" " * (size - len(body)))
        assert connection.getresponse().status == status
        connection.close()


def test_a_refusal_passes_with_its_headers(served: tuple[StandIn, int]) -> None:
    service, port = served
    service.status = 503
    connection = begin(port)
    response = connection.getresponse()
    assert (response.status, response.headers["Retry-After"]) == (503, "7")
    assert json.loads(response.read())["error"]["code"] == "refused"
    connection.close()
    service.status = 200
