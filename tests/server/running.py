"""A server in a separate process, which is killed whatever happens."""

from __future__ import annotations

import contextlib
import http.client
import json
import pathlib
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence

from tests.process import HARD_LIMIT_S, ROOT, environment


class Running:
    """A listening process.

    Attributes:
      process: The process.
      port: The port it listens on.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.port = 0
        self._resources = contextlib.ExitStack()
        self._said: list[str] = []
        self._has_said = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()
        found = self.wait_for(r"listening on https?://.*:(\d+)")
        self.port = int(found[1])

    @property
    def said(self) -> str:
        """What it has written on stderr so far."""
        return "".join(self._said)

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Waits until it has said something."""
        deadline = time.monotonic() + HARD_LIMIT_S
        with self._has_said:
            while (found := re.search(pattern, self.said)) is None:
                assert self.process.poll() is None, f"exit code {self.process.returncode}: {self.said[-3000:]}"
                assert time.monotonic() < deadline, self.said[-3000:]
                self._has_said.wait(1)
        return found

    def ask(self, path: str, body: object = None) -> tuple[int, dict]:
        """One request on its own connection."""
        response = self.begin(path, body)
        return response.status, json.loads(response.read())

    def metric(self, name: str) -> float:
        """The value of a metric."""
        text = self.begin("/metrics").read().decode()
        return float(text.partition(f"\nstep3:{name}{{")[2].split()[1])

    def begin(self, path: str, body: object = None) -> http.client.HTTPResponse:
        """The start of an answer, whose rest is still to be read."""
        return self._resources.enter_context(self.send(path, body).getresponse())

    def send(self, path: str, body: object = None, key: str = "none") -> http.client.HTTPConnection:
        """Sends a request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=HARD_LIMIT_S)
        self._resources.callback(connection.close)
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        connection.request("GET" if body is None else "POST", path, data, headers)
        return connection

    def close(self) -> None:
        """Closes all connections."""
        self._resources.close()

    def wait(self) -> int:
        """Waits for its end and returns the exit code."""
        return self.process.wait(HARD_LIMIT_S)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._has_said:
                self._said.append(line)
                self._has_said.notify_all()
        with self._has_said:
            self._has_said.notify_all()


@contextlib.contextmanager
def running(command: Sequence[str], **variables: str) -> Iterator[Running]:
    """Starts a server: `command` follows the interpreter."""
    with subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment(**variables),
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        watch = threading.Timer(HARD_LIMIT_S, process.kill)
        watch.start()
        server = None
        try:
            server = Running(process)
            yield server
        finally:
            watch.cancel()
            process.kill()
            if server is not None:
                server.close()


PROGRAM = pathlib.Path(__file__).parent / "programs" / "served.py"
