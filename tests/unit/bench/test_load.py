"""Loads on a service with scripted answers, and the resulting figures."""

from __future__ import annotations

import asyncio
import pathlib
from collections.abc import AsyncIterator, Iterator

import pytest

from step3_jax.bench.load import Load, Record, run_load
from step3_jax.bench.plot import draw_waits
from step3_jax.bench.serve import find_waits, summarise
from step3_jax.client import ServiceClient
from tests.server.stand_in import StandIn, serve


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[StandIn, str]]:
    service = StandIn()
    with serve(service.app()) as url:
        yield service, url


@pytest.fixture
def service(running: tuple[StandIn, str]) -> StandIn:
    running[0].__init__()  # type: ignore[misc]
    return running[0]


def run(url: str, load: Load, count: int) -> list[Record]:
    bodies = [{"messages": [], "number": number, "stream_options": {"include_usage": True}} for number in range(count)]

    async def send() -> list[Record]:
        async with ServiceClient(url, timeout_s=30) as client:
            return await run_load(client, "chat/completions", bodies, load)

    return asyncio.run(send())


@pytest.mark.parametrize("load", [Load(concurrency=3), Load(rate=200.0)])
def test_every_request_is_sent_once_and_its_pieces_are_timed(
    load: Load, running: tuple[StandIn, str], service: StandIn
) -> None:
    records = run(running[1], load, 12)
    assert sorted(body["number"] for body in service.bodies) == list(range(12))
    for record in records:
        assert record.error is None
        assert (len(record.piece_s), record.output_tokens, record.prompt_tokens) == (4, 4, 12)
        moments = [record.due_s, record.sent_s, *record.piece_s, record.end_s]
        assert moments == sorted(moments)


def test_a_closed_loop_has_as_many_at_a_time_and_never_more(running: tuple[StandIn, str], service: StandIn) -> None:
    most = 0
    events = service._events

    async def count(*arguments: object) -> AsyncIterator[str]:
        nonlocal most
        async for event in events(*arguments):  # type: ignore[arg-type]
            most = max(most, service.num_running)
            if most == 3:
                service.held_from = None
            yield event

    service.held_from = 0
    service._events = count  # type: ignore[assignment, method-assign]
    try:
        run(running[1], Load(concurrency=3), 12)
    finally:
        del service._events  # type: ignore[method-assign]
    assert most == 3


def test_refusals_are_counted_and_not_timed(running: tuple[StandIn, str], service: StandIn) -> None:
    service.status = 503
    records = run(running[1], Load(concurrency=2), 4)
    service.status, service.is_cut = 200, True
    records += run(running[1], Load(concurrency=2), 2)
    found = summarise(records, {"ttft": 1e9})
    assert found["errors"] == {"503": 4, "cut": 2}
    assert (found["answered"], found["good_share"], found["waits_ms"]) == (0, 0.0, [])


def test_moments_of_an_open_loop_have_its_rate_and_come_again_with_their_seed() -> None:
    moments = Load(rate=50.0, seed=4).draw_moments(4000)
    assert moments[-1] == pytest.approx(80.0, rel=0.1)
    assert moments == Load(rate=50.0, seed=4).draw_moments(4000)
    assert moments != Load(rate=50.0, seed=5).draw_moments(4000)


@pytest.mark.parametrize(
    "given", [{}, {"concurrency": 1, "rate": 1.0}, {"concurrency": 0}, {"rate": 0.0}, {"rate": float("inf")}]
)
def test_a_load_is_one_of_two(given: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"either|at least 1|more than 0"):
        Load(**given)  # type: ignore[arg-type]


RECORDS = [
    # Sent late: its wait counts from when it was due.
    Record(1.0, 1.5, [2.0, 2.1, 2.4], 2.5, prompt_tokens=10, output_tokens=5),
    Record(2.0, 2.0, [2.2, 2.3], 2.3, prompt_tokens=30, output_tokens=2),
    Record(2.0, 2.0, [], 2.4, error="503"),
    Record(2.0, 2.0, [], 6.5),
]


def test_waits_are_those_of_their_moments() -> None:
    waits = find_waits(RECORDS[0])
    assert waits is not None
    assert waits.first == pytest.approx(1000)
    assert waits.between == pytest.approx([100, 300])
    assert waits.each == pytest.approx(100), "0.4 s for the four tokens behind the first"
    assert waits.whole == pytest.approx(1500)
    assert find_waits(RECORDS[2]) is None


def test_figures_of_a_load() -> None:
    found = summarise(RECORDS, {"ttft": 500.0, "itl": 150.0})
    assert (found["requests"], found["answered"], found["empty_answers"]) == (4, 2, 1)
    assert found["errors"] == {"503": 1}
    assert found["duration_s"] == pytest.approx(5.0)
    assert found["requests_per_s"] == pytest.approx(0.4)
    assert found["output_tokens_per_s"] == pytest.approx(1.4)
    assert found["prompt_tokens"] == 40
    assert found["latest_send_ms"] == pytest.approx(500)
    assert found["good_requests_per_s"] == pytest.approx(0.2)
    rows = {row["of"]: row for row in found["waits_ms"]}  # type: ignore[attr-defined]
    assert rows["first token"]["p50"] == pytest.approx(600)
    assert rows["between tokens"]["mean"] == pytest.approx(500 / 3)
    assert rows["end to end"]["p99"] == pytest.approx(1488)


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_waits_are_drawn(ending: str, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    file = tmp_path / f"waits.{ending}"
    draw_waits(RECORDS, file, "two requests")
    assert file.stat().st_size > 1000
