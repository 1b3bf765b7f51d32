"""One request about the model, from its first byte to the last of the answer.

The order is what keeps the server safe: is it open, is there room, then the body, then its meaning, then the engine.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Generic, TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from step3_jax.engine.request import StreamPiece
from step3_jax.server.admission import Ticket
from step3_jax.server.body import Disconnected, read_body
from step3_jax.server.constraint import refuse_former_names
from step3_jax.server.context import find_log
from step3_jax.server.error import ApiError, internal_error
from step3_jax.server.generation import Generation
from step3_jax.server.protocol.common import Answer
from step3_jax.server.service import Service
from step3_jax.server.stream import DONE, HEADERS, KEEP_ALIVE, format_event

_LOG = logging.getLogger(__name__)

BodyModel = TypeVar("BodyModel", bound=BaseModel)


class Job(abc.ABC):
    """A request that was understood, with its prompts ready, and what becomes of its output.

    Attributes:
      generation: The engine's part.
      is_stream: Whether the answer is a stream.
    """

    def __init__(self, generation: Generation, *, is_stream: bool) -> None:
        self.generation = generation
        self.is_stream = is_stream

    @abc.abstractmethod
    def start(self) -> list[bytes]:
        """What a stream begins with, before anything is generated."""

    @abc.abstractmethod
    def add(self, place: int, piece: StreamPiece) -> list[bytes]:
        """Takes new output of a prompt; what a stream says of it."""

    @abc.abstractmethod
    def end(self) -> list[bytes]:
        """What a stream ends with."""

    @abc.abstractmethod
    def answer(self) -> Answer:
        """The whole answer."""


# Understands a body and makes its prompts, having counted its completions.
Planner = Callable[[Service, BodyModel, Ticket], Awaitable[Job]]


class Exchange(Response, Generic[BodyModel]):
    """Reads a request, runs it, and answers it, as a stream or whole."""

    def __init__(self, service: Service, model: type[BodyModel], planner: Planner[BodyModel]) -> None:
        """Takes what an endpoint is made of.

        Args:
          service: Answers.
          model: Form of the body.
          planner: Understands it.
        """
        super().__init__()
        self._service = service
        self._model = model
        self._planner = planner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service = self._service
        service.lifecycle.require_open()
        with service.admission.enter() as ticket:
            body = await receive_body(Request(scope, receive), service, self._model)
            job = await self._planner(service, body, ticket)
            with job.generation as generation:
                log = find_log(scope)
                log.records = generation.records
                if service.config.log_prompts:
                    log.prompts = [request.prompt.text or "" for request in generation.requests]
                generation.start()
                async with _interrupted_by_leaving(receive, generation):
                    if job.is_stream:
                        await _send_stream(job, send, service.config.sse_keep_alive_interval or None)
                        return
                    while not generation.is_over:
                        for place, piece in await generation.take():
                            job.add(place, piece)
            answer = Response(job.answer().to_json(), media_type="application/json")
            await answer(scope, receive, send)


async def receive_body(request: Request, service: Service, model: type[BodyModel]) -> BodyModel:
    """The body of a request, its unknown fields noted."""

    def inspect(body: Mapping[str, object]) -> None:
        refuse_former_names(body)
        service.note_unknown(body, model)

    return await read_body(
        request,
        model,
        max_bytes=service.config.max_body_bytes,
        pool=service.pool,
        inspect=inspect,
    )


async def _send_stream(job: Job, send: Send, keep_alive_s: float | None) -> None:
    headers = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    last = DONE
    try:
        await _send_events(send, job.start())
        while not job.generation.is_over:
            pieces = await job.generation.take(keep_alive_s)
            if not pieces:
                await send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
            await _send_events(send, [event for place, piece in pieces for event in job.add(place, piece)])
        await _send_events(send, job.end())
    except Disconnected:
        raise
    except ApiError as error:
        # Without the end mark, which would make it a success.
        last = format_event(error.body().to_json())
    except Exception:
        _LOG.exception("a stream failed by a mistake of the server's")
        last = format_event(internal_error().body().to_json())
    await send({"type": "http.response.body", "body": last, "more_body": False})


async def _send_events(send: Send, events: list[bytes]) -> None:
    if events:
        await send({"type": "http.response.body", "body": b"".join(map(format_event, events)), "more_body": True})


@contextlib.asynccontextmanager
async def _interrupted_by_leaving(receive: Receive, generation: Generation) -> AsyncIterator[None]:
    """Interrupts what is generated when the client leaves."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        generation.interrupt(Disconnected())

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
