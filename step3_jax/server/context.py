"""Wraps every request: its id, one log line at its end, and an answer whatever happens inside."""

from __future__ import annotations

import dataclasses
import logging
import re
import time
import uuid
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from step3_jax.server.body import Disconnected
from step3_jax.server.error import ApiError, internal_error
from step3_jax.server.metric import RequestRecord

_LOG = logging.getLogger(__name__)

# Printable ASCII; anything else from a client is replaced.
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
# Paths that are polled every few seconds.
_QUIET = frozenset(("/health", "/ready", "/live", "/metrics"))
_STATE_KEY = "step3_log"
# The status of a request whose client has disconnected, as proxies log it.
_CLIENT_LEFT = 499


@dataclasses.dataclass
class RequestLog:
    """What is logged about a request.

    Attributes:
      request_id: The client's, or made here.
      records: What the engine did for it.
      prompts: Text of its prompts, if logged.
      has_left: Whether the client disconnected before the end.
    """

    request_id: str
    records: list[RequestRecord] = dataclasses.field(default_factory=list)
    prompts: list[str] = dataclasses.field(default_factory=list)
    has_left: bool = False

    def describe(self) -> str:
        """Details beyond method, path and status."""
        parts = []
        for record in self.records:
            first_s = None if record.first_token_s is None else record.first_token_s - record.arrived_s
            parts.append(
                f"prompt={record.num_prompt_tokens} cached={record.num_cached_tokens} "
                f"generated={record.num_generated_tokens} n={record.n}"
                + ("" if first_s is None else f" first={first_s:.3f}s")
                + f" finish={','.join(dict.fromkeys(record.finish_reasons)) or '-'}"
            )
        return "".join(f" | {part}" for part in (*parts, *(f"text={text!r}" for text in self.prompts)))


def find_log(scope: Scope) -> RequestLog:
    """What is logged about the current request."""
    log: RequestLog = scope["state"][_STATE_KEY]
    return log


class ContextMiddleware:
    """Gives each request an id, logs it at its end, and answers 500 for unexpected errors."""

    def __init__(self, app: ASGIApp, on_disconnect: Callable[[], None], is_closing: Callable[[], bool]) -> None:
        """Wraps an application.

        Args:
          app: The wrapped application.
          on_disconnect: Called when a client has disconnected before the end of its answer.
          is_closing: Whether connections should be closed after their answers.
        """
        self._app = app
        self._on_disconnect = on_disconnect
        self._is_closing = is_closing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"").decode("latin-1")
        log = RequestLog(given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex)
        scope.setdefault("state", {})[_STATE_KEY] = log
        start, status = time.monotonic(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                more = [(b"x-request-id", log.request_id.encode())]
                if self._is_closing():
                    more.append((b"connection", b"close"))
                message = {**message, "headers": [*message.get("headers", ()), *more]}
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Disconnected:
            log.has_left = True
            self._on_disconnect()
        except ApiError as error:
            if not status:
                await error.response()(scope, receive, send_with_id)
        except Exception:
            _LOG.exception("request %s: internal server error", log.request_id)
            if not status:
                await internal_error().response()(scope, receive, send_with_id)
        finally:
            self._write(scope, log, _CLIENT_LEFT if log.has_left else status, time.monotonic() - start)

    def _write(self, scope: Scope, log: RequestLog, status: int, seconds: float) -> None:
        level = logging.DEBUG if scope["path"] in _QUIET else logging.INFO
        _LOG.log(
            level,
            "%s %s %.200s %d %.3fs%s",
            log.request_id,
            scope["method"],
            # A line break in it could forge a log line.
            ascii(scope["path"])[1:-1],
            status,
            seconds,
            log.describe(),
        )
