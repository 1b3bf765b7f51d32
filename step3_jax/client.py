"""A client of an OpenAI-compatible service: lists its models, and streams answers in chunks."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import httpcore2

# Seconds to connect; the time between two bytes of an answer has its own limit.
_CONNECT_S = 10.0
_DONE = b"[DONE]"


class ServiceError(RuntimeError):
    """A request without an answer, or with half of one.

    Attributes:
      kind: The HTTP status as text; "unreachable", "timeout", "error" (reported in the stream), or "cut" (the stream ended
        before the answer did).
    """

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


class EventReader:
    """Splits bytes that arrive in pieces into the data of server-sent events. Linear time; drops comments."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def push(self, piece: bytes) -> Iterator[bytes]:
        """The data of each event that a piece completes."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            text = line.removesuffix(b"\r")
            if text.startswith(b"data:"):
                self._data.append(text[5:].removeprefix(b" "))
            elif not text and self._data:
                yield b"\n".join(self._data)
                self._data = []


class ServiceClient:
    """Connections to one service. Use it in `async with`, from one event loop.

    Attributes:
      url: Its API's address, including /v1.
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout_s: float = 600.0) -> None:
        """Checks the URL; nothing is sent yet.

        Args:
          url: `http://host:port` or `https://...`, with or without /v1.
          api_key: Sent as a bearer token.
          timeout_s: Longest silence before and within an answer.

        Raises:
          ValueError: If it is not a URL, or the HTTP library is missing.
        """
        try:
            import httpcore2  # noqa: PLC0415  (an extra)
        except ImportError:
            raise ValueError("talking to a service needs httpcore2: pip install 'step3-jax[server]'") from None
        parts = urlsplit(url.strip())
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(f"{url!r} is not the address of a service; give one such as http://127.0.0.1:8000")
        root = f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/")
        self.url = root if root.endswith("/v1") else f"{root}/v1"
        self._http = httpcore2
        self._pool = httpcore2.AsyncConnectionPool(max_connections=None, keepalive_expiry=30.0)
        self._headers: dict[bytes | str, bytes | str] = {"Content-Type": "application/json", "User-Agent": "step3-jax"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._timeouts = {"connect": _CONNECT_S, "read": timeout_s, "write": timeout_s, "pool": timeout_s}

    async def __aenter__(self) -> ServiceClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._pool.aclose()

    async def list_models(self) -> list[str]:
        """Names of the service's models.

        Raises:
          ServiceError: If it does not list them.
        """
        try:
            response = await self._pool.request(
                "GET", f"{self.url}/models", headers=self._headers, extensions=self._limits
            )
        except (self._http.NetworkError, self._http.ProtocolError, self._http.TimeoutException) as error:
            raise self._describe(error) from None
        if response.status != 200:
            raise _refusal(response.status, response.content)
        try:
            return [str(model["id"]) for model in json.loads(response.content)["data"]]
        except (ValueError, KeyError, TypeError):
            raise ServiceError(f"{self.url}/models does not answer with a list of models", "error") from None

    async def stream(self, path: str, request: Mapping[str, object]) -> AsyncGenerator[dict[str, object], None]:
        """Sends a request and yields the chunks of its answer as they arrive; leaving it early aborts the request.

        Args:
          path: `chat/completions` or `completions`.
          request: The body; `stream` is added.

        Yields:
          JSON objects.

        Raises:
          ServiceError: If the request is refused, or the answer ends before it is complete.
        """
        body = json.dumps({**request, "stream": True}).encode()
        events = EventReader()
        try:
            async with self._pool.stream(
                "POST", f"{self.url}/{path}", headers=self._headers, content=body, extensions=self._limits
            ) as response:
                if response.status != 200:
                    raise _refusal(response.status, await response.aread())
                async for piece in response.aiter_stream():
                    for data in events.push(piece):
                        if data == _DONE:
                            return
                        yield _parse_chunk(data)
        except (self._http.NetworkError, self._http.ProtocolError, self._http.TimeoutException) as error:
            raise self._describe(error) from None
        raise ServiceError("the connection ended before the answer did", "cut")

    @property
    def _limits(self) -> dict[str, object]:
        return {"timeout": self._timeouts}

    def _describe(
        self, error: httpcore2.NetworkError | httpcore2.ProtocolError | httpcore2.TimeoutException
    ) -> ServiceError:
        if isinstance(error, self._http.ConnectTimeout | self._http.ConnectError):
            return ServiceError(f"{self.url} cannot be reached: {error or 'no answer'}", "unreachable")
        if isinstance(error, self._http.TimeoutException):
            return ServiceError(f"{self.url} was silent for {self._timeouts['read']:g} s", "timeout")
        return ServiceError(f"the connection to {self.url} broke: {error or type(error).__name__}", "cut")


def _parse_chunk(data: bytes) -> dict[str, object]:
    try:
        chunk = json.loads(data)
    except ValueError:
        chunk = None
    if not isinstance(chunk, dict):
        raise ServiceError(f"the service sent something that is not a chunk: {data[:80]!r}", "error")
    error = chunk.get("error")
    if error is not None:
        message = error.get("message") if isinstance(error, dict) else error
        raise ServiceError(f"the service ended the answer: {message}", "error")
    return chunk


def _refusal(status: int, body: bytes) -> ServiceError:
    try:
        message = str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = body[:200].decode("utf-8", "replace").strip()
    return ServiceError(f"the service answers {status}: {message or 'nothing more'}", str(status))
