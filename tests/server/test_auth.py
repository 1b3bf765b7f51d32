"""Keys: every route but the open ones needs one, by the route that a path resolves to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from starlette.routing import Route

from tests.server.client import Client, ask
from tests.server.conftest import Open

KEYS = ("alpha-key", "beta-key")
OPEN = ("/health", "/ready", "/live", "/version", "/metrics", "/", "/page/page.js", "/docs")


@pytest.fixture(scope="module")
def guarded(open_client: Open) -> Iterator[Client]:
    with open_client(api_key=KEYS, docs=True) as client:
        yield client


def all_routes(client: Client) -> list[tuple[str, str]]:
    return [
        (route.path.replace("{model_id:path}", "toy").replace("{name}", "page.js"), method)
        for route in client.app.routes
        if isinstance(route, Route) or hasattr(route, "methods")
        for method in sorted(route.methods)
        if method != "HEAD"
    ]


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize("given", [None, "", "wrong", KEYS[0][:-1], KEYS[0] + "x", "alpha-key beta-key"])
def test_every_route_but_the_open_ones_needs_a_key(guarded: Client, given: str | None) -> None:
    routes = all_routes(guarded)
    assert len(routes) > 10
    for path, method in routes:
        body = {} if method == "POST" else None
        reply = guarded.call(path, body, method=method, headers={} if given is None else bearer(given))
        if path in OPEN:
            assert reply.status == 200, path
        else:
            assert (reply.status, reply.error["code"]) == (401, "invalid_api_key"), path
            assert reply.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("key", KEYS)
def test_each_key_opens(guarded: Client, key: str) -> None:
    assert guarded.call("/v1/models", headers=bearer(key)).status == 200
    assert guarded.call("/v1/chat/completions", ask(), headers=bearer(key)).status == 200
    assert guarded.call("/openapi.json", headers={"Authorization": f"bearer  {key}"}).status == 200


@pytest.mark.parametrize("path", ["//v1/models", "/V1/models", "/v1/models/", "/health/../v1/models", "/x"])
def test_no_spelling_of_a_path_goes_past(guarded: Client, path: str) -> None:
    assert guarded.call(path).status == 401


def test_other_kinds_of_keys_are_none(guarded: Client) -> None:
    for value in (f"Basic {KEYS[0]}", KEYS[0], f"Bearer{KEYS[0]}", "Bearer", "Bearer \xff"):
        assert guarded.call("/v1/models", headers={"authorization": value}).status == 401


def test_a_body_is_not_read_without_a_key(guarded: Client) -> None:
    reply = guarded.call("/v1/chat/completions", b"x", pieces=[])
    assert reply.status == 401


def test_metrics_have_a_key_of_their_own_if_one_is_given(open_client: Open) -> None:
    with open_client(metrics_key="m", api_key=("k",)) as client:
        assert client.call("/metrics").status == 401
        assert client.call("/metrics", headers=bearer("k")).status == 401
        assert client.call("/metrics", headers=bearer("m")).status == 200
        assert client.call("/v1/models", headers=bearer("m")).status == 401


def test_pages_of_other_origins_may_call_only_where_they_are_named(open_client: Open) -> None:
    origin = {"origin": "https://good.example", "access-control-request-method": "POST"}
    with open_client(allowed_origins=("https://good.example",), api_key=("k",)) as client:
        preflight = client.call("/v1/chat/completions", method="OPTIONS", headers=origin)
        assert preflight.status == 200
        assert preflight.headers["access-control-allow-origin"] == "https://good.example"
        assert "access-control-allow-credentials" not in preflight.headers
        refused = client.call("/v1/models", headers={"origin": "https://good.example"})
        assert (refused.status, refused.headers["access-control-allow-origin"]) == (401, "https://good.example")
        bad = client.call("/v1/models", headers=bearer("k") | {"origin": "https://bad.example"})
        assert "access-control-allow-origin" not in bad.headers
    with open_client() as client:
        assert "access-control-allow-origin" not in client.call("/v1/models", headers=origin).headers


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, set()),
        ({"metrics_key": "m"}, {"/metrics"}),
        (
            {"api_key": KEYS},
            {
                *("/v1/models", "/v1/models/{model_id}", "/v1/chat/completions", "/v1/completions", "/v1/responses"),
                *("/tokenize", "/detokenize"),
            },
        ),
    ],
)
def test_the_description_says_which_routes_need_a_key(
    open_client: Open, keys: dict[str, object], expected: set[str]
) -> None:
    with open_client(**keys) as client:
        found = client.call("/openapi.json", headers=bearer(KEYS[0])).json()
        guarded = {
            path
            for path, operations in found["paths"].items()
            if all(operation.get("security") == [{"key": []}] for operation in operations.values())
        }
        assert guarded == expected
        assert found["components"]["securitySchemes"]["key"] == {"type": "http", "scheme": "bearer"}
