"""Both ends of the channel in one process: which worker connects, which fails, which is gone."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import pytest

from step3_jax.channel import driver as driver_end
from step3_jax.channel.address import ChannelAddress
from step3_jax.channel.driver import DriverChannel
from step3_jax.channel.failure import RunLostError
from step3_jax.channel.message import Message
from step3_jax.channel.worker import WorkerChannel
from tests.process import free_port

LIMIT_S = 30


def make_address(secret: bytes | None = None) -> ChannelAddress:
    return ChannelAddress("127.0.0.1", free_port(), secret)


@contextlib.contextmanager
def ends(
    address: ChannelAddress, *, takes_batches: tuple[bool, ...] = (True,)
) -> Iterator[tuple[DriverChannel, list[WorkerChannel]]]:
    """Rank 0's end, and those of workers that are ready; all are closed at the end."""
    with contextlib.ExitStack() as stack:
        driver = DriverChannel(address, len(takes_batches))
        stack.callback(driver.close)
        workers = []
        for rank, takes in enumerate(takes_batches, start=1):
            worker = WorkerChannel(address, rank, f"ffn {rank} (rank {rank} on h)")
            stack.callback(worker.close)
            worker.wait_for_driver(LIMIT_S)
            worker.ready(takes_batches=takes)
            workers.append(worker)
        driver.wait_for_workers(LIMIT_S)
        driver.wait_until_ready()
        yield driver, workers


@pytest.mark.parametrize("secret", [None, b"s" * 32], ids=["plain", "secret"])
def test_a_call_reaches_all_workers_in_order(secret: bytes | None) -> None:
    with ends(make_address(secret), takes_batches=(True, False)) as (driver, [whole, small]):
        for number in range(3):
            driver.send(Message("decode", {"n": number}), Message("sizes", {"n": number}))
        driver.send(Message("copy", {}), None)
        driver.close()
        assert [whole.receive().kind for _ in range(5)] == ["decode", "decode", "decode", "copy", "goodbye"]
        assert [small.receive() for _ in range(3)] == [Message("sizes", {"n": number}) for number in range(3)]
        assert small.receive().kind == "goodbye"


def test_a_question_is_answered_by_all() -> None:
    with ends(make_address(), takes_batches=(True, True)) as (driver, workers):

        def answer(worker: WorkerChannel, value: int) -> None:
            assert worker.receive().kind == "measure"
            worker.answer({"bytes": value})

        threads = [threading.Thread(target=answer, args=pair) for pair in zip(workers, (5, 7), strict=True)]
        for thread in threads:
            thread.start()
        found = driver.ask(Message("measure", {}), LIMIT_S)
        assert sorted(answer["bytes"] for answer in found) == [5, 7]  # type: ignore[type-var]
        for thread in threads:
            thread.join()
        with pytest.raises(TimeoutError, match=r"ffn 1 \(rank 1 on h\) did not answer within 0.01 s, in measure"):
            driver.ask(Message("measure", {}), 0.01)


def test_a_worker_that_does_not_come_is_named() -> None:
    driver = DriverChannel(make_address(), 2)
    with contextlib.closing(driver), pytest.raises(TimeoutError, match=r"rank 1, 2 did not come to rank 0 at 127"):
        driver.wait_for_workers(0.01)


def test_a_worker_without_the_secret_is_turned_away() -> None:
    address = make_address(b"s" * 32)
    driver = DriverChannel(address, 1)
    stranger = WorkerChannel(ChannelAddress(address.host, address.port, b"t" * 32), 1, "a stranger")
    with contextlib.closing(driver), contextlib.closing(stranger):
        with pytest.raises(TimeoutError, match="STEP3_SECRET the same"):
            stranger.wait_for_driver(0.5)
        with pytest.raises(TimeoutError, match="rank 1 did not come"):
            driver.wait_for_workers(0.01)


def test_an_error_of_a_worker_names_it_and_its_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_end, "_DOUBT_S", 0.05)
    heard: list[RunLostError] = []
    with ends(make_address()) as (driver, [worker]):
        has_heard = threading.Event()

        def hear(failure: RunLostError) -> None:
            heard.append(failure)
            has_heard.set()

        driver.on_failure(hear)
        worker.fail("decode", "ValueError: no room")
        assert has_heard.wait(LIMIT_S)
        message = r"^ffn 1 \(rank 1 on h\) failed in decode: ValueError: no room$"
        with pytest.raises(RunLostError, match=message):
            driver.send(Message("decode", {}), None)
        with pytest.raises(RunLostError, match=message):
            driver.check()
    assert len(heard) == 1


def test_a_worker_that_is_gone_is_blamed_before_one_that_lost_it() -> None:
    with ends(make_address(), takes_batches=(True, True)) as (driver, [first, second]):
        first.fail("decode", "XlaRuntimeError: connection reset by peer")
        second.close()
        with pytest.raises(RunLostError, match=r"^ffn 2 \(rank 2 on h\) is gone$"):
            driver.ask(Message("measure", {}), LIMIT_S)


def test_a_worker_that_says_why_and_leaves_is_known_by_what_it_said() -> None:
    with ends(make_address()) as (driver, [worker]):
        worker.fail("prefill", "ValueError: x")
        worker.close()
        with pytest.raises(RunLostError, match=r"failed in prefill: ValueError: x$"):
            driver.ask(Message("measure", {}), LIMIT_S)


def test_a_worker_hears_that_rank_0_is_gone() -> None:
    with ends(make_address()) as (driver, [worker]):
        driver._failure = RunLostError("so that no goodbye is said")
        driver.close()
        with pytest.raises(RunLostError, match="rank 0 is gone"):
            worker.receive()


def test_another_channel_may_follow_at_the_same_address() -> None:
    address = make_address(b"s" * 32)
    for _ in range(3):
        with ends(address) as (driver, [worker]):
            driver.close()
            assert worker.receive().kind == "goodbye"


def test_a_port_that_is_taken_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_end, "_BIND_S", 0.0)
    address = make_address()
    with contextlib.closing(DriverChannel(address, 1)), pytest.raises(ValueError, match="STEP3_CHANNEL=host:port"):
        DriverChannel(address, 1)
