"""The application: its routes and middleware."""

from __future__ import annotations

import functools
import time
from collections.abc import Awaitable, Callable

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from step3_jax import __version__
from step3_jax.engine.llm import LLM
from step3_jax.server.auth import KeyMiddleware, needs_key
from step3_jax.server.chat import plan_chat
from step3_jax.server.chat_page import INDEX, page_response
from step3_jax.server.completion import plan_completion
from step3_jax.server.config import ServerConfig
from step3_jax.server.context import ContextMiddleware
from step3_jax.server.docs_page import docs_response
from step3_jax.server.error import RETRY_AFTER_S, ApiError
from step3_jax.server.exchange import BodyModel, Exchange, Planner, receive_body
from step3_jax.server.lifecycle import State
from step3_jax.server.metric import CONTENT_TYPE
from step3_jax.server.openapi import describe_errors, describe_request, describe_responses, set_openapi
from step3_jax.server.protocol.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionRequest
from step3_jax.server.protocol.common import Answer
from step3_jax.server.protocol.completion import Completion, CompletionRequest
from step3_jax.server.protocol.error import ErrorBody
from step3_jax.server.protocol.model import ModelCard, ModelList, Status, Version
from step3_jax.server.protocol.response import ResponseEvent, ResponseObject, ResponseRequest
from step3_jax.server.protocol.tokenize import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
)
from step3_jax.server.responses import plan_response
from step3_jax.server.service import Service
from step3_jax.server.tokenize import detokenize, tokenize

_HTTP_CODES = {404: "not_found", 405: "method_not_allowed"}


def build_app(llm: LLM | None = None, config: ServerConfig | None = None) -> FastAPI:
    """The service as an ASGI application.

    Args:
      llm: The model, which nothing else may use from then on. None for an application that answers 503 until
        `app.state.service.attach(llm)`, so that a server can listen while the model is loaded.
      config: The settings.

    Returns:
      The application; its `state.service` is the `Service`.
    """
    config = ServerConfig() if config is None else config
    service = Service(config)
    app = FastAPI(
        title="step3-jax",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.service = service
    _add_status(app, service)
    _add_models(app, service)
    _add_generation(app, service)
    if config.has_page:
        _add_page(app)
    if config.docs:
        _add_docs(app)
    app.add_exception_handler(HTTPException, _answer_http)
    # The last one is the outermost.
    app.add_middleware(
        KeyMiddleware, keys=config.api_key, metrics_key=config.metrics_key, routes=lambda: app.router.routes
    )
    app.add_middleware(
        ContextMiddleware,
        on_disconnect=service.metrics.count_disconnect,
        is_closing=lambda: service.lifecycle.state in (State.DRAINING, State.DEAD),
    )
    if config.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id"],
        )
    if llm is not None:
        service.attach(llm)
    return app


def _add_status(app: FastAPI, service: Service) -> None:
    def answer(status: str) -> Response:
        is_ok = status == State.OK.value
        headers = {} if is_ok else {"Retry-After": str(RETRY_AFTER_S)}
        return Response(Status(status=status).to_json(), 200 if is_ok else 503, headers, "application/json")

    async def live(request: Request) -> Response:
        """The process listens."""
        return Response(Status(status="ok").to_json(), media_type="application/json")

    async def health(request: Request) -> Response:
        """The model is loaded, its programs are compiled, and the engine runs."""
        return answer(service.lifecycle.state.value)

    async def ready(request: Request) -> Response:
        """Like /health, and the engine makes progress."""
        is_stalled = service.lifecycle.state is State.OK and service.is_stalled
        return answer("stalled" if is_stalled else service.lifecycle.state.value)

    async def version(request: Request) -> Response:
        """The version of this server."""
        return Response(Version(version=__version__).to_json(), media_type="application/json")

    async def metrics(request: Request) -> Response:
        """Metrics for Prometheus."""
        return Response(service.metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    for endpoint in (live, health, ready):
        responses = describe_responses(Status)
        responses[503] = {"description": "not now", "content": responses[200]["content"]}
        path = f"/{endpoint.__name__}"
        # Balancers and uptime checks often ask with HEAD. This route answers; the next one is for /openapi.json alone,
        # where one operation would have to stand for both methods.
        app.add_api_route(path, endpoint, methods=["GET", "HEAD"], include_in_schema=False)
        app.add_api_route(path, endpoint, response_class=Response, responses=responses)
    app.add_api_route("/version", version, response_class=Response, responses=describe_responses(Version))
    text = {"description": "metrics", "content": {"text/plain": {"schema": {"type": "string"}}}}
    app.add_api_route(
        "/metrics", metrics, response_class=Response, responses={200: text, **describe_errors([401, 500])}
    )


def _add_page(app: FastAPI) -> None:
    async def page(request: Request) -> Response:
        found = page_response(request.path_params.get("name", INDEX))
        if found is None:
            raise HTTPException(404)
        return found

    for path, name in (("/", "page"), ("/page/{name}", "page_file")):
        app.add_api_route(path, page, name=name, response_class=Response, include_in_schema=False)


def _add_docs(app: FastAPI) -> None:
    async def docs(request: Request) -> Response:
        return docs_response(app.openapi())

    app.add_api_route("/docs", docs, response_class=Response, include_in_schema=False)


def _add_models(app: FastAPI, service: Service) -> None:
    created = int(time.time())

    def describe(name: str) -> ModelCard:
        return ModelCard(
            id=name,
            object="model",
            created=created,
            owned_by="step3",
            root=service.names[0],
            parent=None,
            max_model_len=service.llm.max_model_len,
        )

    async def list_models(request: Request) -> Response:
        """All names of the model."""
        found = ModelList(object="list", data=[describe(name) for name in service.names])
        return Response(found.to_json(), media_type="application/json")

    async def get_model(request: Request) -> Response:
        """One name of the model."""
        card = describe(service.choose_name(request.path_params["model_id"]))
        return Response(card.to_json(), media_type="application/json")

    app.add_api_route("/v1/models", list_models, response_class=Response, responses=describe_responses(ModelList))
    parameter = {"name": "model_id", "in": "path", "required": True, "schema": {"type": "string"}}
    app.add_api_route(
        "/v1/models/{model_id:path}",
        get_model,
        response_class=Response,
        responses=describe_responses(ModelCard) | describe_errors([404]),
        openapi_extra={"parameters": [parameter]},
    )


def _add_generation(app: FastAPI, service: Service) -> None:
    def add(
        path: str,
        name: str,
        model: type[BaseModel],
        responses: dict[int | str, dict[str, object]],
        endpoint: Callable[[Request], Awaitable[Response]],
    ) -> None:
        app.add_api_route(
            path,
            endpoint,
            methods=["POST"],
            name=name,
            response_class=Response,
            responses=responses,
            openapi_extra=describe_request(model),
        )

    def add_exchange(
        path: str,
        name: str,
        model: type[BodyModel],
        planner: Planner[BodyModel],
        answer: type[Answer],
        chunk: type[Answer],
    ) -> None:
        async def endpoint(request: Request) -> Response:
            return Exchange(service, model, planner)

        add(path, name, model, describe_responses(answer, chunk, has_body=True), endpoint)

    def add_call(
        path: str,
        name: str,
        model: type[BodyModel],
        call: Callable[[Service, BodyModel], Awaitable[Answer]],
        answer: type[Answer],
    ) -> None:
        async def endpoint(request: Request) -> Response:
            service.lifecycle.require_open()
            with service.admission.enter():
                made = await call(service, await receive_body(request, service, model))
            return Response(made.to_json(), media_type="application/json")

        add(path, name, model, describe_responses(answer, has_body=True), endpoint)

    add_exchange(
        "/v1/chat/completions",
        "create_chat_completion",
        ChatCompletionRequest,
        plan_chat,
        ChatCompletion,
        ChatCompletionChunk,
    )
    add_exchange("/v1/completions", "create_completion", CompletionRequest, plan_completion, Completion, Completion)
    add_exchange("/v1/responses", "create_response", ResponseRequest, plan_response, ResponseObject, ResponseEvent)
    add_call("/tokenize", "tokenize", TokenizeRequest, tokenize, TokenizeResponse)
    add_call("/detokenize", "detokenize", DetokenizeRequest, detokenize, DetokenizeResponse)
    set_openapi(
        app,
        [ChatCompletionRequest, CompletionRequest, ResponseRequest, TokenizeRequest, DetokenizeRequest],
        [
            *(ChatCompletion, ChatCompletionChunk, Completion, ResponseEvent, ResponseObject),
            *(TokenizeResponse, DetokenizeResponse),
            *(ModelCard, ModelList, Status, Version, ErrorBody),
        ],
        functools.partial(
            needs_key, has_keys=bool(service.config.api_key), has_metrics_key=service.config.metrics_key is not None
        ),
    )


async def _answer_http(request: Request, error: Exception) -> Response:
    """Router errors in the same form as all others."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    given = (error.headers or {}) if isinstance(error, HTTPException) else {}
    headers = {name.title(): value for name, value in given.items()}
    if "Allow" in headers:
        # The router returns them in no particular order.
        headers["Allow"] = ", ".join(sorted(headers["Allow"].split(", ")))
    path = request.url.path[:200]
    said = f"{request.method} is not allowed for {path}; use {headers.get('Allow')}"
    message = said if status == 405 else f"there is nothing at {path}"
    return ApiError(status, message, code=_HTTP_CODES.get(status), headers=headers).response()
