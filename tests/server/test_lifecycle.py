"""What the server says about itself, and what happens to requests when it ends or its engine dies."""

from __future__ import annotations

import asyncio

import pytest

from step3_jax.channel.failure import RunLostError
from step3_jax.engine.core import EngineCore
from step3_jax.server.app import build_app
from tests.server.client import Reply, ask, opened
from tests.server.conftest import Open


def test_health_is_503_until_the_model_is_there_and_live_is_200() -> None:
    with opened(build_app(), None) as client:
        assert client.call("/live").status == 200
        for path in ("/health", "/ready"):
            reply = client.call(path)
            assert (reply.status, reply.json()) == (503, {"status": "starting"})
        assert client.call("/version").status == 200
        assert client.call("/metrics").status == 200


def test_health_runs_no_request(open_client: Open) -> None:
    with open_client() as client:
        for path in ("/live", "/health", "/ready"):
            assert (client.call(path).status, client.call(path).json()) == (200, {"status": "ok"})
        assert client.executor.num_decoded == 0


def test_probes_may_ask_with_head(open_client: Open) -> None:
    with open_client() as client:
        for path in ("/live", "/health", "/ready"):
            reply = client.call(path, method="HEAD")
            assert reply.status == 200
            assert "head" not in client.call("/openapi.json").json()["paths"][path]


def test_ready_is_503_while_the_engine_gets_nowhere(open_client: Open) -> None:
    with open_client(stall_seconds=0.1) as client:

        async def run() -> None:
            client.executor.gate.clear()
            call = client.start("/v1/chat/completions", ask())
            await client.wait_until(lambda: client.service.is_stalled)
            ready = await client.start("/ready").finish()
            assert (ready.status, ready.json()) == (503, {"status": "stalled"})
            assert (await client.start("/health").finish()).status == 200
            client.executor.num_traces["decode"] += 1
            assert not client.service.is_stalled, "a program is compiled"
            client.executor.gate.set()
            await call.finish()
            await client.wait_until(lambda: not client.service.is_stalled)

        client.run(run())
        assert client.call("/ready").status == 200


def test_while_it_drains_requests_under_way_end_and_others_are_503(open_client: Open) -> None:
    with open_client() as client:

        async def run() -> tuple[Reply, Reply, Reply]:
            client.executor.gate.clear()
            under_way = client.start("/v1/chat/completions", ask(stream=True))
            await under_way.see(lambda reply: b"assistant" in reply.body)
            client.service.lifecycle.drain()
            late = await client.start("/v1/chat/completions", ask()).finish()
            health = await client.start("/health").finish()
            client.executor.gate.set()
            return await under_way.finish(), late, health

        under_way, late, health = client.run(run())
        assert under_way.events[-1]["choices"][0]["finish_reason"] == "stop"
        assert (late.status, late.error["code"]) == (503, "shutting_down")
        assert late.headers["retry-after"]
        assert late.headers["connection"] == "close"
        assert (health.status, health.json()) == (503, {"status": "draining"})


def test_what_does_not_end_in_time_gets_an_error(open_client: Open) -> None:
    with open_client() as client:

        async def run() -> list[Reply]:
            client.executor.gate.clear()
            calls = [client.start("/v1/chat/completions", ask(stream=stream)) for stream in (True, False)]
            await client.wait_until(lambda: len(client.service.generations) == 2)
            client.service.lifecycle.drain()
            client.service.end_all()
            return await asyncio.gather(*(call.finish() for call in calls))

        stream, whole = client.run(run())
        assert b'data: {"error":' in stream.body
        assert b"[DONE]" not in stream.body
        assert (whole.status, whole.error["code"]) == (503, "shutting_down")
        assert client.service.admission.num_requests == 0


def test_a_dead_engine_is_told_to_every_client(
    open_client: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with open_client() as client:
        deaths: list[int] = []
        client.service.on_death(lambda: deaths.append(1))

        def fail(core: EngineCore) -> None:
            raise AssertionError("a bug")

        async def run() -> tuple[list[Reply], Reply, Reply]:
            client.executor.gate.clear()
            calls = [client.start("/v1/chat/completions", ask(stream=stream)) for stream in (True, False)]
            await client.wait_until(lambda: len(client.service.generations) == 2)
            monkeypatch.setattr(EngineCore, "step", fail)
            client.executor.gate.set()
            waiting = await asyncio.gather(*(call.finish() for call in calls))
            late = await client.start("/v1/chat/completions", ask()).finish()
            return waiting, late, await client.start("/health").finish()

        (stream, whole), late, health = client.run(run())
        assert b'data: {"error":' in stream.body
        assert b"[DONE]" not in stream.body
        assert (whole.status, whole.error["code"]) == (503, "engine_dead")
        assert (late.status, late.error["code"]) == (503, "engine_dead")
        assert (health.status, health.json()) == (503, {"status": "dead"})
        assert deaths == [1]
    assert "a bug" in caplog.text


def test_a_process_that_is_lost_while_nothing_is_to_be_done_ends_the_engine(
    open_client: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with open_client() as client:

        def fail() -> None:
            raise RunLostError("rank 1 (on h) is gone")

        async def run() -> Reply:
            client.service.start_driver()
            monkeypatch.setattr(client.executor, "check", fail)
            await client.wait_until(lambda: client.service.lifecycle.is_dead)
            return await client.start("/health").finish()

        health = client.run(run())
        assert (health.status, health.json()) == (503, {"status": "dead"})
    assert "rank 1 (on h) is gone" in caplog.text
