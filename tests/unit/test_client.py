"""A service's answers as its clients read them: whole, refused, broken, cut off, or missing."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator

import pytest

from step3_jax.client import EventReader, ServiceClient, ServiceError
from tests.process import free_port
from tests.server.stand_in import StandIn, serve

EVENTS = b': keep-alive\n\ndata: {"a": 1}\r\n\r\ndata:x\ndata: y\n\nid: 7\n\ndata: [DONE]\n\n'


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[StandIn, str]]:
    service = StandIn()
    with serve(service.app()) as url:
        yield service, url


@pytest.fixture
def service(running: tuple[StandIn, str]) -> StandIn:
    running[0].__init__()  # type: ignore[misc]
    return running[0]


def ask(url: str, **options: object) -> list[dict[str, object]]:
    async def collect() -> list[dict[str, object]]:
        async with ServiceClient(url, **options) as client:  # type: ignore[arg-type]
            request = {"model": "stand-in", "messages": [{"role": "user", "content": "Hi"}]}
            return [chunk async for chunk in client.stream("chat/completions", request)]

    return asyncio.run(collect())


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_events_are_the_same_in_any_pieces(size: int) -> None:
    reader = EventReader()
    pieces = [EVENTS[start : start + size] for start in range(0, len(EVENTS), size)]
    assert [data for piece in pieces for data in reader.push(piece)] == [b'{"a": 1}', b"x\ny", b"[DONE]"]


@pytest.mark.parametrize("form", ["{}", "{}/", "{}/v1", " {}/v1/ "])
def test_an_answer_comes_in_chunks(form: str, running: tuple[StandIn, str], service: StandIn) -> None:
    chunks = ask(form.format(running[1]))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]  # type: ignore[index]
    assert "".join(delta.get("content", "") for delta in deltas) == "It is a dog."
    assert service.bodies[0]["stream"] is True


def test_models_are_listed_with_the_key(running: tuple[StandIn, str], service: StandIn) -> None:
    service.key = "secret"

    async def list_models(key: str | None) -> list[str]:
        async with ServiceClient(running[1], api_key=key) as client:
            return await client.list_models()

    assert asyncio.run(list_models("secret")) == ["stand-in"]
    with pytest.raises(ServiceError, match="401: This server needs a key") as caught:
        asyncio.run(list_models(None))
    assert caught.value.kind == "401"


def refuse(service: StandIn) -> None:
    service.status, service.message = 503, "The queue is full."


def break_off(service: StandIn) -> None:
    service.is_broken = True


def cut(service: StandIn) -> None:
    service.is_cut = True


def stall(service: StandIn) -> None:
    service.delay_s = 5.0


@pytest.mark.parametrize(
    ("spoil", "kind", "said"),
    [
        (refuse, "503", "answers 503: The queue is full."),
        (break_off, "error", "ended the answer: Something is wrong."),
        (cut, "cut", "ended before the answer did"),
        (stall, "timeout", r"silent for 0\.05 s"),
    ],
)
def test_what_goes_wrong_has_a_kind(
    spoil: Callable[[StandIn], None], kind: str, said: str, running: tuple[StandIn, str], service: StandIn
) -> None:
    spoil(service)
    with pytest.raises(ServiceError, match=said) as caught:
        ask(running[1], timeout_s=0.05 if spoil is stall else 30.0)
    assert caught.value.kind == kind


def test_a_service_that_is_not_there_is_named() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ServiceError, match=f"{url}/v1 cannot be reached") as caught:
        ask(url)
    assert caught.value.kind == "unreachable"


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "ftp://host", "http://", "http://host/?x=1"])
def test_other_addresses_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="such as http://127"):
        ServiceClient(url)


def test_without_the_library_the_install_command_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpcore2", None)
    with pytest.raises(ValueError, match=r"pip install 'step3-jax\[server\]'"):
        ServiceClient("http://127.0.0.1:8000")
