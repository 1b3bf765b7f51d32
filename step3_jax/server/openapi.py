"""The OpenAPI description, from the models of requests and answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from step3_jax import __version__
from step3_jax.server.protocol.error import ErrorBody

_REFERENCE = "#/components/schemas/{model}"
_ERRORS = {
    400: "something in the request is not allowed",
    401: "a key is missing or wrong",
    404: "there is no such model",
    408: "the body did not arrive in time",
    413: "the body is too large",
    415: "the body is not application/json",
    500: "an internal error of the server",
    503: "the server is starting, shutting down, or full",
}


def describe_request(model: type[BaseModel]) -> dict[str, object]:
    """FastAPI's `openapi_extra` for a route that reads its body itself."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": _refer(model)}}}}


def describe_responses(
    model: type[BaseModel], chunk: type[BaseModel] | None = None, *, has_body: bool = False
) -> dict[int | str, dict[str, object]]:
    """FastAPI's `responses` for a route.

    Args:
      model: Model of the answer.
      chunk: Model of each stream event; None if there is no stream.
      has_body: Whether the request has a body.
    """
    content: dict[str, object] = {"application/json": {"schema": _refer(model)}}
    if chunk is not None:
        text = {"type": "string"}
        event = {"type": "object", "properties": {"event": text, "data": text}, "required": ["data"]}
        # The last one may be [DONE], which is not JSON.
        content["text/event-stream"] = {"schema": event, "x-event-schema": _refer(chunk)}
    statuses = [401, 500, 503, *((400, 404, 408, 413, 415) if has_body else ())]
    return {200: {"description": "the answer", "content": content}, **describe_errors(statuses)}


def describe_errors(statuses: Sequence[int]) -> dict[int | str, dict[str, object]]:
    """FastAPI's `responses` for errors."""
    return {
        status: {"description": _ERRORS[status], "content": {"application/json": {"schema": _refer(ErrorBody)}}}
        for status in sorted(statuses)
    }


def set_openapi(
    app: FastAPI,
    requests: Sequence[type[BaseModel]],
    answers: Sequence[type[BaseModel]],
    needs_key: Callable[[str], bool],
) -> None:
    """Gives an application its description, made once, on the first request.

    Args:
      app: An application with all its routes.
      requests: Models of requests that routes refer to.
      answers: The same for answers.
      needs_key: Whether the route with a path needs a key.
    """

    def openapi() -> dict[str, object]:
        if app.openapi_schema is None:
            described = get_openapi(title="step3-jax", version=__version__, routes=app.routes)
            described.setdefault("components", {}).setdefault("schemas", {}).update(_schemas(requests, answers))
            described["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            for path, operations in described["paths"].items():
                for operation in operations.values() if needs_key(path) else ():
                    operation["security"] = [{"key": []}]
            app.openapi_schema = described
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _schemas(requests: Sequence[type[BaseModel]], answers: Sequence[type[BaseModel]]) -> Mapping[str, object]:
    _, found = models_json_schema(
        [*((model, "validation") for model in requests), *((model, "serialization") for model in answers)],
        ref_template=_REFERENCE,
    )
    schemas: Mapping[str, object] = found["$defs"]
    return schemas


def _refer(model: type[BaseModel]) -> dict[str, object]:
    return {"$ref": _REFERENCE.format(model=model.__name__)}
