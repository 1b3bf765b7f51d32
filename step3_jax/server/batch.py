"""Answers the requests of a file with the service's own application, without a socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Scope

from step3_jax.server.batch_file import BatchInput, BatchLine, BatchOutput
from step3_jax.server.error import ENDED

# Before a request that found the service busy with others is sent again.
_RETRY_S = 0.1


class BatchStopped(RuntimeError):
    """The service has stopped answering; the missing answers can be requested again."""


async def run_batch(
    app: ASGIApp,
    given: BatchInput,
    output: BatchOutput,
    *,
    concurrency: int,
    tell: Callable[[int], None] = lambda _: None,
) -> int:
    """Answers every request that has no answer yet.

    Args:
      app: The service, see `build_app`. Requests that find its queue full are sent again.
      given: The requests.
      output: Receives the answers, in the order of completion.
      concurrency: Requests at a time; somewhat more than the engine's slots keep it busy.
      tell: Called after each answer with its status.

    Returns:
      How many of them were errors.

    Raises:
      BatchStopped: If the service has stopped.
      OSError: If the output cannot be written.
    """
    num_errors = 0
    left = iter([line for line in given.lines if line.custom_id not in output.done])

    async def work() -> None:
        nonlocal num_errors
        for line in left:
            while True:
                status, request_id, body = await _call(app, line, given.read_body(line))
                # Not the request's fault: it must be sent again.
                if status != 503:
                    break
                error = json.loads(body)["error"]
                if error["code"] in ENDED:
                    raise BatchStopped(error["message"])
                await asyncio.sleep(_RETRY_S)
            await output.add(line.custom_id, status, request_id, body)
            num_errors += status != 200
            tell(status)

    tasks = [asyncio.create_task(work()) for _ in range(concurrency)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return num_errors


async def _call(app: ASGIApp, line: BatchLine, body: bytes) -> tuple[int, str, bytes]:
    """Status, request id and body of the answer to a request."""
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": line.url,
        "raw_path": line.url.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())],
        "client": None,
        "server": None,
    }
    request: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    answer: list[Message] = []

    async def receive() -> Message:
        if request:
            return request.pop()
        # The client stays until it has its answer.
        return await asyncio.get_running_loop().create_future()

    async def send(message: Message) -> None:
        answer.append(message)

    await app(scope, receive, send)
    headers = dict(answer[0]["headers"])
    found = b"".join(message.get("body", b"") for message in answer[1:])
    return answer[0]["status"], headers.get(b"x-request-id", b"").decode("latin-1"), found
