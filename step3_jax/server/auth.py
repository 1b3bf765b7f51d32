"""Keys: every route needs one except those listed as open, decided by the route that a request resolves to."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Sequence

from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Receive, Scope, Send

from step3_jax.server.error import ApiError

# Their clients have no key: load balancers, the kubelet, Prometheus, browsers. The page is where a user enters the key.
OPEN = frozenset(("/health", "/ready", "/live", "/version", "/metrics", "/", "/page/{name}", "/docs"))


def needs_key(path: str | None, *, has_keys: bool, has_metrics_key: bool) -> bool:
    """Whether a route needs a key.

    Args:
      path: The route's path; None for an unknown path, which needs a key too.
      has_keys: Whether there are keys.
      has_metrics_key: Whether there is one for /metrics.
    """
    return has_metrics_key if path == "/metrics" else has_keys and path not in OPEN


class KeyMiddleware:
    """Refuses requests without a key before reading any of their body."""

    def __init__(
        self,
        app: ASGIApp,
        keys: Sequence[str],
        metrics_key: str | None,
        routes: Callable[[], Sequence[BaseRoute]],
    ) -> None:
        """Wraps an application.

        Args:
          app: The wrapped application.
          keys: Any one of them is enough; empty if no key is needed.
          metrics_key: Only for /metrics; None if no key is needed there.
          routes: The application's.
        """
        self._app = app
        self._keys = tuple(key.encode() for key in keys)
        self._metrics_keys = () if metrics_key is None else (metrics_key.encode(),)
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            keys = self._keys_for(scope)
            if keys and not _has_key(scope, keys):
                raise ApiError(
                    401,
                    "a key is needed: send the header Authorization: Bearer KEY with one of this server's keys",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        await self._app(scope, receive, send)

    def _keys_for(self, scope: Scope) -> Sequence[bytes]:
        """The keys, one of which a request needs."""
        path = _find_path(scope, self._routes())
        is_guarded = needs_key(path, has_keys=bool(self._keys), has_metrics_key=bool(self._metrics_keys))
        return () if not is_guarded else self._metrics_keys if path == "/metrics" else self._keys


def _find_path(scope: Scope, routes: Sequence[BaseRoute]) -> str | None:
    """The path of the route that a request resolves to, whatever its method."""
    return next((getattr(route, "path", None) for route in routes if route.matches(scope)[0] is not Match.NONE), None)


def _has_key(scope: Scope, keys: Sequence[bytes]) -> bool:
    given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
    kind, _, key = given.partition(b" ")
    if kind.lower() != b"bearer":
        return False
    # Compare all of them, each in constant time.
    return sum(hmac.compare_digest(key.strip(), one) for one in keys) > 0
