"""Calls an application in process, piece by piece: output is seen as it arrives, and the client can disconnect."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping

from fastapi import FastAPI

from step3_jax.server.service import Service
from tests.server.fake import ReplyExecutor

# Nothing in process takes a tenth of it.
LIMIT_S = 60


@dataclasses.dataclass
class Reply:
    """A response.

    Attributes:
      status: 0 if nothing did.
      headers: Names in lower case.
      body: All of it.
    """

    status: int = 0
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    body: bytes = b""

    def json(self) -> dict:
        return json.loads(self.body)

    @property
    def error(self) -> dict:
        return self.json()["error"]

    @property
    def events(self) -> list[dict]:
        """The events of a stream that ended well."""
        lines = [line for line in self.body.decode().split("\n\n") if line and not line.startswith(":")]
        assert lines[-1] == "data: [DONE]", lines[-1]
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


class Call:
    """One request in progress."""

    def __init__(self, app: FastAPI, method: str, path: str, headers: Mapping[str, str], pieces: list[bytes]) -> None:
        self.reply = Reply()
        self._app = app
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        path, _, query = path.partition("?")
        self._scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": raw,
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 8000),
        }
        self._pieces = list(pieces)
        self._has_left = asyncio.Event()
        self._has_new = asyncio.Event()
        self.task = asyncio.create_task(self._run())

    def leave(self) -> None:
        """The client closes its connection."""
        self._has_left.set()

    async def see(self, is_enough: Callable[[Reply], bool]) -> Reply:
        """Waits until enough has arrived."""
        async with asyncio.timeout(LIMIT_S):
            while not is_enough(self.reply) and not self.task.done():
                self._has_new.clear()
                await self._has_new.wait()
        return self.reply

    async def finish(self) -> Reply:
        """Waits for the end."""
        async with asyncio.timeout(LIMIT_S):
            await self.task
        return self.reply

    async def _run(self) -> None:
        try:
            await self._app(self._scope, self._receive, self._send)
        finally:
            self._has_new.set()

    async def _receive(self) -> dict:
        if self._pieces:
            piece = self._pieces.pop(0)
            return {"type": "http.request", "body": piece, "more_body": bool(self._pieces)}
        await self._has_left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict) -> None:
        if message["type"] == "http.response.start":
            self.reply.status = message["status"]
            self.reply.headers = {name.decode().lower(): value.decode() for name, value in message["headers"]}
        else:
            self.reply.body += message.get("body", b"")
        self._has_new.set()


class Client:
    """Calls one application from one event loop, which a test runs with `run` or `call`.

    Attributes:
      app: The application.
      service: Its state.
      executor: Its model.
    """

    def __init__(self, app: FastAPI, executor: ReplyExecutor | None, runner: asyncio.Runner) -> None:
        self.app = app
        self.executor = executor
        self.service: Service = app.state.service
        self.run = runner.run

    def start(
        self,
        path: str,
        body: object = None,
        *,
        method: str | None = None,
        headers: Mapping[str, str] | None = None,
        pieces: list[bytes] | None = None,
    ) -> Call:
        """Starts a request, from inside the loop."""
        if pieces is None:
            pieces = [body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()]
        kind = {} if body is None else {"content-type": "application/json"}
        return Call(self.app, method or ("GET" if body is None else "POST"), path, kind | dict(headers or {}), pieces)

    def call(self, path: str, body: object = None, **values: object) -> Reply:
        """One request, to its end."""

        async def finish() -> Reply:
            return await self.start(path, body, **values).finish()

        return self.run(finish())

    def chat(self, text: str = "Hi", **values: object) -> Reply:
        """One question."""
        return self.call("/v1/chat/completions", ask(text, **values))

    async def wait_until(self, holds: Callable[[], bool]) -> None:
        """Waits for a condition in the engine's thread."""
        async with asyncio.timeout(LIMIT_S):
            while not holds():
                await asyncio.sleep(0.005)

    def metric(self, name: str, **labels: str) -> float:
        """The value of a metric."""
        found = self.service.metrics.registry.get_sample_value(
            f"step3:{name}", {"model_name": self.service.names[0], "engine": "0"} | labels
        )
        assert found is not None, name
        return found


def ask(text: str = "Hi", **values: object) -> dict[str, object]:
    """The body of a request with one question."""
    return {"messages": [{"role": "user", "content": text}], "temperature": 0} | values


@contextlib.contextmanager
def opened(app: FastAPI, executor: ReplyExecutor | None) -> Iterator[Client]:
    """A client of an application whose threads end with it."""
    with asyncio.Runner() as runner:
        client = Client(app, executor, runner)
        try:
            yield client
        finally:
            if executor is not None:
                executor.gate.set()
            assert client.service.close(LIMIT_S)
