"""One request to the model, from its first byte to the last byte of the answer.

The order keeps the server safe: is it open, is there room, then the body, then its meaning, then the engine.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Generic, TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from step3_jax.engine.request import StreamPiece
from step3_jax.server.admission import Ticket
from step3_jax.server.body import Disconnected, read_body
from step3_jax.server.constraint import refuse_unheeded
from step3_jax.server.context import find_log
from step3_jax.server.error import ApiError, internal_error
from step3_jax.server.generation import Generation
from step3_jax.server.protocol.common import Answer
from step3_jax.server.service import Service
from step3_jax.server.stream import DONE, HEADERS, KEEP_ALIVE, format_event

_LOG = logging.getLogger(__name__)

BodyModel = TypeVar("BodyModel", bound=BaseModel)


class Job(abc.ABC):
    """An interpreted request, with its prompts ready, and how its output is returned.

    Attributes:
      generation: The engine's part.
      is_stream: Whether the answer is a stream.
    """

    # After the last event of a stream.
    end_mark = DONE

    def __init__(self, generation: Generation, *, is_stream: bool) -> None:
        self.generation = generation
        self.is_stream = is_stream

    @abc.abstractmethod
    def start(self) -> list[bytes]:
        """The first events of a stream, before anything is generated."""

    @abc.abstractmethod
    def add(self, place: int, piece: StreamPiece) -> list[bytes]:
        """Takes new output of a prompt; returns its stream events."""

    @abc.abstractmethod
    def end(self) -> list[bytes]:
        """The last events of a stream."""

    def fail(self, error: ApiError) -> bytes:
        """The last events of a stream that failed: without the end mark, which would make it a success."""
        return format_event(error.body().to_json())

    @abc.abstractmethod
    def answer(self) -> Answer:
        """The whole answer."""


# Interprets a body and makes its prompts, having counted its completions.
Planner = Callable[[Service, BodyModel, Ticket], Awaitable[Job]]


class Exchange(Response, Generic[BodyModel]):
    """Reads a request, runs it, and answers it, streamed or whole."""

    def __init__(self, service: Service, model: type[BodyModel], planner: Planner[BodyModel]) -> None:
        """Takes the parts of an endpoint.

        Args:
          service: The service that answers.
          model: The model of the body.
          planner: Interprets the body.
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
                generation.start(log.request_id)
                async with _interrupted_by_leaving(receive, generation):
                    if job.is_stream:
                        await send_stream(job, send, service.config.sse_keep_alive_interval or None)
                        return
                    while not generation.is_over:
                        for place, piece in await generation.take():
                            job.add(place, piece)
            answer = Response(job.answer().to_json(), media_type="application/json")
            await answer(scope, receive, send)


async def receive_body(request: Request, service: Service, model: type[BodyModel]) -> BodyModel:
    """The body of a request; notes unknown fields."""

    def inspect(body: Mapping[str, object]) -> None:
        refuse_unheeded(body, model)
        service.note_unknown(body, model, find_log(request.scope).request_id)

    return await read_body(
        request,
        model,
        max_bytes=service.config.max_body_bytes,
        pool=service.pool,
        inspect=inspect,
    )


async def send_stream(job: Job, send: Send, keep_alive_s: float | None) -> None:
    """Sends a job's events as its output is generated.

    Args:
      job: The job, whose generation has started.
      send: Takes ASGI messages.
      keep_alive_s: A comment is sent when nothing else has been for this long; None for never.

    Raises:
      Disconnected: If the client has disconnected.
    """
    headers = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    last = job.end_mark
    try:
        await _send_events(send, job.start())
        sent_s = time.monotonic()
        while not job.generation.is_over:
            wait_s = None if keep_alive_s is None else max(0.0, sent_s + keep_alive_s - time.monotonic())
            pieces = await job.generation.take(wait_s)
            events = [event for place, piece in pieces for event in job.add(place, piece)]
            # Tokens that are not sent, such as those of an unfinished tool call, do not keep a connection alive.
            if not events and keep_alive_s is not None and time.monotonic() >= sent_s + keep_alive_s:
                events = [KEEP_ALIVE]
            if events:
                await _send_events(send, events)
                sent_s = time.monotonic()
        await _send_events(send, job.end())
    except Disconnected:
        raise
    except ApiError as error:
        last = job.fail(error)
    except Exception:
        _LOG.exception("request %s: internal server error in the stream", job.generation.log_id)
        last = job.fail(internal_error())
    await send({"type": "http.response.body", "body": last, "more_body": False})


async def _send_events(send: Send, events: list[bytes]) -> None:
    if events:
        await send({"type": "http.response.body", "body": b"".join(events), "more_body": True})


@contextlib.asynccontextmanager
async def _interrupted_by_leaving(receive: Receive, generation: Generation) -> AsyncIterator[None]:
    """Interrupts generation when the client disconnects."""

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
