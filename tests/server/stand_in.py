"""A small service that gives scripted answers in OpenAI's format, and remembers what it was asked."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from step3_jax.server.chat_page import page_response


@dataclasses.dataclass
class StandIn:
    """The scripted answers, and what was asked.

    Attributes:
      reasoning: Pieces of the reasoning.
      content: Pieces of the answer.
      finish_reason: The answer's.
      delay_s: Delay before each piece.
      held_from: Pieces that are sent before the stream waits for this to be None; the role is one, and so is each text.
      status: Other than 200: the answer is an error, with `message`.
      message: The error's; after the first pieces if `status` is 200 and `is_broken`.
      is_broken: Whether the stream ends with an error event.
      is_cut: Whether the stream ends in the middle.
      key: Required of requests; None for none.
      bodies: Bodies of all chat and text completions.
      num_running: Streams that are being answered.
    """

    reasoning: Sequence[str] = ("Let me ", "see.")
    content: Sequence[str] = ("It is ", "a dog.")
    finish_reason: str = "stop"
    delay_s: float = 0.0
    held_from: int | None = None
    status: int = 200
    message: str = "Something is wrong."
    is_broken: bool = False
    is_cut: bool = False
    key: str | None = None
    bodies: list[dict[str, object]] = dataclasses.field(default_factory=list)
    num_running: int = 0

    def app(self) -> Starlette:
        """The service with the chat page."""
        return Starlette(
            routes=[
                Route("/", self._page),
                Route("/page/{name}", self._page),
                Route("/v1/models", self._models),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/completions", self._complete, methods=["POST"]),
            ]
        )

    async def _page(self, request: Request) -> Response:
        return page_response(**request.path_params) or Response(status_code=404)

    def _refuse(self, request: Request) -> Response | None:
        status, code, message = self.status, "refused", self.message
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            status, code, message = 401, "invalid_api_key", "This server needs a key."
        if status == 200:
            return None
        error = {"message": message, "type": "error", "param": None, "code": code}
        return JSONResponse({"error": error}, status, {"Retry-After": "7"} if status == 503 else None)

    async def _models(self, request: Request) -> Response:
        # The models are listed while requests are refused; the key is needed for both.
        status, self.status = self.status, 200
        refusal = self._refuse(request)
        self.status = status
        card = {"id": "stand-in", "object": "model", "max_model_len": 4096}
        return refusal or JSONResponse({"object": "list", "data": [card]})

    async def _chat(self, request: Request) -> Response:
        deltas = [{"role": "assistant", "content": ""}]
        deltas += [{"reasoning_content": piece, "reasoning": piece} for piece in self.reasoning]
        deltas += [{"content": piece} for piece in self.content]
        return await self._stream(request, [{"delta": delta} for delta in deltas], {"delta": {}})

    async def _complete(self, request: Request) -> Response:
        return await self._stream(request, [{"text": piece} for piece in self.content], {"text": ""})

    async def _stream(
        self, request: Request, choices: Sequence[Mapping[str, object]], last: Mapping[str, object]
    ) -> Response:
        refusal = self._refuse(request)
        if refusal is not None:
            return refusal
        body = json.loads(await request.body())
        assert body["stream"], "the stand-in streams alone"
        self.bodies.append(body)
        return StreamingResponse(self._events(body, choices, last), media_type="text/event-stream")

    async def _events(
        self, body: Mapping[str, object], choices: Sequence[Mapping[str, object]], last: Mapping[str, object]
    ) -> AsyncIterator[str]:
        self.num_running += 1
        options = body.get("stream_options")
        wanted = options if isinstance(options, dict) else {}
        try:
            yield ": keep-alive\n\n"
            for number, choice in enumerate(choices):
                await asyncio.sleep(self.delay_s)
                while self.held_from is not None and number >= self.held_from:
                    await asyncio.sleep(0.01)
                usage = _usage(number) if wanted.get("continuous_usage_stats") else None
                yield _event({"choices": [{"index": 0, **choice, "finish_reason": None}], "usage": usage})
            if self.is_broken:
                yield _event({"error": {"message": self.message, "type": "server_error", "code": None}})
                return
            if self.is_cut:
                return
            yield _event({"choices": [{"index": 0, **last, "finish_reason": self.finish_reason}]})
            if wanted.get("include_usage"):
                yield _event({"choices": [], "usage": _usage(len(self.reasoning) + len(self.content))})
            yield "data: [DONE]\n\n"
        finally:
            self.num_running -= 1


def _usage(count: int) -> dict[str, object]:
    return {
        "prompt_tokens": 12,
        "completion_tokens": count,
        "total_tokens": 12 + count,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def _event(chunk: Mapping[str, object]) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"


@contextlib.contextmanager
def serve(app: Starlette) -> Iterator[str]:
    """Serves an app in a thread, on a free port of the loopback address; yields its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
