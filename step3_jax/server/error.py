"""Errors of the service: one exception, one format, and how a mistake in a body is reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.responses import Response

from step3_jax.server.protocol.error import ErrorBody, ErrorDetail

MAX_MESSAGE = 1024
# Codes of a server that will not answer any more.
ENDED = frozenset(("engine_dead", "shutting_down"))
# Seconds after which a client may try again.
RETRY_AFTER_S = 1
_MAX_SHOWN = 80
_NOTHING = object()
_TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "invalid_request_error"}


class ApiError(Exception):
    """An answer that is an error.

    Attributes:
      status: The HTTP status.
      message: Field, value, what is allowed.
      param: The field.
      code: A word for programs.
      headers: Headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> ErrorBody:
        """The error as it is sent."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        message = self.message if len(self.message) <= MAX_MESSAGE else self.message[: MAX_MESSAGE - 3] + "..."
        return ErrorBody(error=ErrorDetail(message=message, type=kind, param=self.param, code=self.code))

    def response(self) -> Response:
        """The answer."""
        return Response(self.body().to_json(), self.status, self.headers, "application/json")


def bad_request(message: str, param: str | None = None, code: str | None = "invalid_value") -> ApiError:
    """A client error."""
    return ApiError(400, message, param=param, code=code)


def unavailable(code: str, message: str) -> ApiError:
    """An error that may go away a little later, or on another server."""
    return ApiError(503, message, code=code, headers={"Retry-After": str(RETRY_AFTER_S)})


def internal_error() -> ApiError:
    """An internal error; only the log says what it was."""
    return ApiError(500, "an internal error occurred; the server's log says more", code="internal_error")


def refused(error: ValueError, names: Sequence[str] = ()) -> ApiError:
    """An error from one of the engine's checks.

    Args:
      error: Its message starts with the name of what is wrong, if it has one.
      names: Names of fields.
    """
    text = " ".join(str(error).split())
    head = text.partition(" is ")[0].split()
    param = next((name for name in names if name in head), None)
    return bad_request(text, param)


def describe_invalid(error: ValidationError, body: object) -> ApiError:
    """The first error in a body.

    Args:
      error: What pydantic found.
      body: The body that was checked.
    """
    first, *_ = errors = error.errors(include_url=False, include_context=False)
    branches: dict[tuple[str | int, ...], list[_Mistake]] = {}
    for one in errors:
        if one["loc"][:1] == first["loc"][:1]:
            path, branch = _locate(one, body)
            branches.setdefault(branch, []).append(_Mistake(path, one))
    # Among a union's branches, the one with the fewest errors was probably meant, and then the one that got furthest.
    root = min(len(mistake.path) for group in branches.values() for mistake in group)
    groups = [group for group in branches.values() if not group[0].is_of_another_kind(root)]
    groups = groups or list(branches.values())
    path, one = min(groups, key=lambda group: (len(group), [-_rank(part) for part in group[0].path]))[0]
    same = [mistake.error["msg"] for group in groups for mistake in group if mistake.path == path]
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".") or "the body"
    if one["type"] == "missing":
        return bad_request(f"{name} is missing; it is required", name, "missing_required_parameter")
    needed = " or ".join(dict.fromkeys(text[0].lower() + text[1:] for text in same))
    return bad_request(f"{name} is {_show(one['input'])}; {needed}", name, "invalid_type")


def unknown_names(body: Mapping[str, object], model: type[BaseModel]) -> list[str]:
    """Names in a body that are unknown to its model."""
    known = set(model.model_fields) | {field.alias for field in model.model_fields.values() if field.alias}
    return [name for name in body if name not in known]


class _Mistake(NamedTuple):
    """An error and its place in the body."""

    path: tuple[str | int, ...]
    error: ErrorDetails

    def is_of_another_kind(self, depth: int) -> bool:
        """Whether the value of a union at this depth is of an entirely different kind from this branch's."""
        return self.error["type"].endswith("_type") and len(self.path) == depth


def _locate(error: ErrorDetails, body: object) -> tuple[tuple[str | int, ...], tuple[str | int, ...]]:
    """Its place in the body, and the names of union branches, which pydantic mixes into the place."""
    path: list[str | int] = []
    branch: list[str | int] = []
    for part in error["loc"]:
        found = _find(body, part)
        if found is not _NOTHING:
            body = found
        elif error["type"] != "missing" or part != error["loc"][-1]:
            branch.append(part)
            continue
        path.append(part)
    return tuple(path), tuple(branch)


def _rank(part: str | int) -> int:
    return part if isinstance(part, int) else 0


def _find(body: object, part: str | int) -> object:
    if isinstance(body, Mapping):
        return body.get(part, _NOTHING)
    is_inside = isinstance(body, list) and isinstance(part, int) and part < len(body)
    return body[part] if is_inside else _NOTHING  # type: ignore[index]


def _show(value: object) -> str:
    text = repr(value[: _MAX_SHOWN + 1] if isinstance(value, str) else value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
