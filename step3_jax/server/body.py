"""Reads the body of a request: its size is counted while it arrives, and only plain JSON is accepted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from typing import NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from step3_jax.server.error import ApiError, bad_request, describe_invalid

MAX_DEPTH = 64
# The most of each in a body: many small values take many times their text in memory, and Python parses and checks them
# without letting other threads run, so that no stream goes on meanwhile.
_LIMITS = (("values", b",", 2**19), ("names", b":", 2**16), ("lists and objects", b"[{", 2**15))
# Two around each string; a body with more of them has too many values or names.
_MAX_QUOTES = 2 * sum(most for _, _, most in _LIMITS)
# The longest that a body may take to arrive.
ARRIVAL_S = 60.0
# Larger ones are parsed in a thread.
_SMALL_BYTES = 2**15

BodyModel = TypeVar("BodyModel", bound=BaseModel)


class Disconnected(Exception):
    """The client disconnected before its request had arrived."""


async def read_body(
    request: Request,
    model: type[BodyModel],
    *,
    max_bytes: int,
    pool: Executor,
    arrival_s: float = ARRIVAL_S,
    inspect: Callable[[Mapping[str, object]], None] | None = None,
) -> BodyModel:
    """The body of a request.

    Args:
      request: A request of which nothing has been read.
      model: The model of the body.
      max_bytes: Its largest size.
      pool: Parses large bodies.
      arrival_s: The longest it may take to arrive.
      inspect: Called with the object before it is validated; may raise.

    Raises:
      ApiError: 400, 408, 413 or 415.
      Disconnected: If the client has disconnected.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"Content-Type is {kind[:80]!r}; application/json is needed", code="unsupported_media_type")
    try:
        data = await asyncio.wait_for(_receive(request, max_bytes), arrival_s)
    except TimeoutError:
        raise ApiError(
            408,
            f"the body did not arrive within {arrival_s:g} s",
            code="request_timeout",
            headers={"Connection": "close"},
        ) from None
    except ClientDisconnect:
        raise Disconnected from None
    if len(data) <= _SMALL_BYTES:
        return _read(data, model, inspect)
    return await asyncio.get_running_loop().run_in_executor(pool, _read, data, model, inspect)


def parse_json(data: bytes) -> object:
    """Parses untrusted JSON.

    Raises:
      ApiError: 400, if it is not valid JSON, holds NaN, an infinity or half a surrogate pair, or is nested too deeply.
    """
    _check_size(data)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _invalid(f"the body is not UTF-8: byte {error.start} is {data[error.start]:#x}") from None
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        raise _invalid(f"the body is not valid JSON: {error}") from None
    _check(value)
    return value


async def _receive(request: Request, max_bytes: int) -> bytes:
    too_large = ApiError(
        413,
        f"the body has more than {max_bytes:,} bytes, which is the limit; send less, or start the server with a larger "
        "--max-body-bytes",
        code="request_too_large",
        headers={"Connection": "close"},
    )
    announced = request.headers.get("content-length", "")
    if announced.isascii() and announced.isdigit() and int(announced[:20]) > max_bytes:
        raise too_large
    pieces, size = [], 0
    async for piece in request.stream():
        size += len(piece)
        if size > max_bytes:
            raise too_large
        pieces.append(piece)
    return b"".join(pieces)


def _read(data: bytes, model: type[BodyModel], inspect: Callable[[Mapping[str, object]], None] | None) -> BodyModel:
    value = parse_json(data)
    if not isinstance(value, dict):
        raise bad_request(f"the body is {type(value).__name__}; a JSON object is needed", code="invalid_type")
    if inspect is not None:
        inspect(value)
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise describe_invalid(error, value) from None


def _check_size(data: bytes) -> None:
    """Refuses JSON that has too many parts, without parsing it."""
    if not _find_excess(data):
        return
    # They count outside strings only.
    bare = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    if bare.count(b'"') <= _MAX_QUOTES:
        bare = b"".join(bare.split(b'"')[::2])
    excess = _find_excess(bare)
    if excess:
        raise _invalid(excess)


def _find_excess(data: bytes) -> str:
    for name, marks, most in _LIMITS:
        count = sum(data.count(mark) for mark in marks)
        if count > most:
            return f"the body has {count:,} {name}; at most {most:,} are allowed"
    return ""


def _check(value: object) -> None:
    """Refuses values that JSON cannot express, and deep nesting. Not recursive, which would overflow the stack."""
    level, depth = [value], 0
    while level:
        depth += 1
        inner: list[object] = []
        for item in level:
            if isinstance(item, str):
                _check_text(item)
            elif isinstance(item, dict | list) and depth > MAX_DEPTH:
                raise _too_deep()
            elif isinstance(item, dict):
                for name in item:
                    _check_text(name)
                inner.extend(item.values())
            elif isinstance(item, list):
                inner.extend(item)
            elif isinstance(item, float) and item - item != 0:
                raise _invalid("the body has a number that is too large for 64 bits")
        level = inner


def _check_text(text: str) -> None:
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise _invalid(
                f"the body has half a surrogate pair, \\u{ord(text[error.start]):04x}, which is not a character"
            ) from None


def _refuse_constant(name: str) -> NoReturn:
    raise _invalid(f"the body has {name}, which JSON does not allow")


def _too_deep() -> ApiError:
    return _invalid(f"the body is nested more than {MAX_DEPTH} deep, which is the limit")


def _invalid(message: str) -> ApiError:
    return bad_request(message, code="invalid_json")
