"""An engine whose executor drives a worker: both make the same calls, and a lost worker ends every wait."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from step3_jax.channel import driver as driver_end
from step3_jax.channel.address import ChannelAddress
from step3_jax.channel.driver import DriverChannel
from step3_jax.channel.failure import RunLostError
from step3_jax.channel.worker import WorkerChannel
from step3_jax.engine.drive.call import AllocateCache, Call, DecodeSizes, MeasureMemory, PrefillSizes
from step3_jax.engine.drive.executor import DrivenExecutor
from step3_jax.engine.drive.worker import CachedWorker, Outcome, Worker, serve_calls
from step3_jax.engine.request import Prompt, Request
from step3_jax.engine.state import DecodeCall
from tests.process import free_port
from tests.unit.engine.fake import FakeExecutor, expected
from tests.unit.engine.test_core import add, make_core, make_image, other_params, request, run

LIMIT_S = 30


@dataclasses.dataclass
class Pair:
    """Rank 0's executor, its own part, and the worker's end."""

    executor: DrivenExecutor
    own: FakeExecutor
    channel: WorkerChannel
    thread: threading.Thread
    errors: list[BaseException]


class SizesWorker(Worker):
    """Records what it is told."""

    takes_batches = False
    num_processes = 2

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def run(self, call: Call) -> Outcome:
        self.calls.append(call)
        return None


class WaitingExecutor(FakeExecutor):
    """Counts waits for its cache."""

    num_waits = 0

    def wait(self, cache: np.ndarray) -> np.ndarray:
        self.num_waits += 1
        return cache


@contextlib.contextmanager
def driving(worker: Worker, own: FakeExecutor | None = None) -> Iterator[Pair]:
    """An executor that drives a worker in a thread; the worker has ended at the end."""
    address = ChannelAddress("127.0.0.1", free_port())
    own = own or FakeExecutor()
    driver = DriverChannel(address, 1)
    channel = WorkerChannel(address, 1, "rank 1 on h")
    errors: list[BaseException] = []

    def serve() -> None:
        try:
            channel.wait_for_driver(LIMIT_S)
            serve_calls(worker, channel)
        except BaseException as error:
            errors.append(error)
        finally:
            channel.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        driver.wait_for_workers(LIMIT_S)
        driver.wait_until_ready()
        executor = DrivenExecutor(own, driver)
        try:
            yield Pair(executor, own, channel, thread, errors)
        finally:
            executor.close()
            executor._thread.join(LIMIT_S)
    finally:
        driver.close()
        thread.join(LIMIT_S)
        assert not thread.is_alive()


def test_a_worker_makes_the_calls_of_the_engine_in_their_order() -> None:
    other = FakeExecutor()
    with driving(CachedWorker(other)) as pair:
        core = make_core(pair.executor)  # type: ignore[arg-type]
        sinks = [add(core, request(str(index), [index + 1] * (100 + index), 20)) for index in range(5)]
        several = add(core, request("n", [9] * 70, 10, n=3))
        run(core)
        for index, sink in enumerate(sinks):
            assert sink.ids() == expected([index + 1] * (100 + index), 20)
        assert [several.ids(index) for index in range(3)] == [expected([9] * 70, 10)] * 3
        assert {"prefill", "decode", "copy"} <= set(pair.own.calls)
        assert core.num_traced == 0
        pair.executor.close()
        pair.thread.join(LIMIT_S)
        assert other.calls == pair.own.calls
        assert other.prefilled == pair.own.prefilled
    assert not pair.errors


def test_waiting_for_the_cache_is_waiting_for_all_calls() -> None:
    other = FakeExecutor()
    with driving(CachedWorker(other)) as pair:
        cache = pair.executor.wait(pair.executor.allocate_cache(4, "float32"))
        pair.executor.wait(pair.executor.copy_pages(cache, (0, 1), (2, 3)))
        assert pair.own.calls == ["copy"]


def test_features_of_images_come_from_rank_0_and_are_made_by_all() -> None:
    other = FakeExecutor()
    with driving(CachedWorker(other)) as pair:
        features = pair.executor.encode_images(np.zeros((3, 3, 4, 4), np.float32))
        assert features.shape == (3, 4, 32)
    assert other.calls == pair.own.calls == ["encode"]


def test_a_worker_that_needs_no_batches_is_told_their_sizes() -> None:
    worker = SizesWorker()
    with driving(worker) as pair:
        core = make_core(pair.executor)  # type: ignore[arg-type]
        sink = add(core, request("a", [7] * 40, 4, steps=2))
        run(core)
        assert sink.ids() == expected([7] * 40, 4)
        pair.executor.close()
        pair.thread.join(LIMIT_S)
    kinds = [type(call) for call in worker.calls if not isinstance(call, MeasureMemory)]
    assert kinds == [PrefillSizes, *[DecodeSizes] * (len(kinds) - 1)]


def test_the_least_memory_of_all_is_left_for_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = FakeExecutor(), FakeExecutor()
    monkeypatch.setattr(own, "cache_memory_bytes", lambda rows, *_: 7000 + rows)
    monkeypatch.setattr(other, "cache_memory_bytes", lambda rows, *_: 5000 + rows)
    with driving(CachedWorker(other), own) as pair:
        assert pair.executor.cache_memory_bytes(4, 64) == 5004
    with driving(SizesWorker(), own) as pair:
        assert pair.executor.cache_memory_bytes(4, 64) == 7004


def test_an_error_of_a_worker_ends_the_engine_and_names_its_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_end, "_DOUBT_S", 0.05)
    other = FakeExecutor()
    other.failures["decode"] = ValueError("no room")
    with driving(CachedWorker(other)) as pair:
        core = make_core(pair.executor)  # type: ignore[arg-type]
        add(core, request("a", [1, 2, 3], 400, steps=1))
        with pytest.raises(RunLostError, match="rank 1 on h failed in decode: ValueError: no room"):
            run(core)
        with pytest.raises(RunLostError, match="no room"):
            core.check_executor()
        with pytest.raises(RunLostError, match="no room"):
            pair.executor.allocate_cache(4, "float32")
    assert [str(error) for error in pair.errors] == ["no room"]


class StuckExecutor(FakeExecutor):
    """Waits inside a decode call, as native code does for a process that is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.is_stuck, self.gate = threading.Event(), threading.Event()

    def decode(self, cache: np.ndarray, call: DecodeCall):  # type: ignore[no-untyped-def]
        self.is_stuck.set()
        assert self.gate.wait(LIMIT_S)
        return super().decode(cache, call)


def test_a_wait_ends_when_the_worker_is_gone_although_native_code_goes_on_waiting() -> None:
    own = StuckExecutor()
    other = FakeExecutor()
    other.failures["decode"] = SystemExit("as if it were killed")
    with driving(CachedWorker(other), own) as pair:
        core = make_core(pair.executor)  # type: ignore[arg-type]
        sink = add(core, request("a", [1, 2, 3], 4))
        with pytest.raises(RunLostError, match="rank 1 on h is gone"):
            run(core)
        assert own.is_stuck.wait(LIMIT_S)
        assert not sink
        own.gate.set()


def test_an_error_of_rank_0_itself_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_end, "_DOUBT_S", 0.05)
    own = FakeExecutor()
    own.failures["late_decode"] = ValueError("device lost")
    with driving(CachedWorker(FakeExecutor()), own) as pair:
        core = make_core(pair.executor)  # type: ignore[arg-type]
        add(core, request("a", [1, 2, 3], 4))
        with pytest.raises(RunLostError, match="rank 0 failed in decode: ValueError: device lost"):
            run(core)


def test_a_lost_worker_is_no_fault_of_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_end, "_DOUBT_S", 0.05)
    other = FakeExecutor()
    other.failures["encode"] = MemoryError("full")
    own = FakeExecutor()
    with driving(CachedWorker(other), own) as pair:
        core = make_core(pair.executor)  # type: ignore[arg-type]
        with contextlib.suppress(RunLostError):
            pair.executor.encode_images(np.zeros((1, 3, 4, 4), np.float32))
        pair.thread.join(LIMIT_S)
        image = make_image(0.5)
        places = tuple(range(3, 3 + image.num_features))
        sink = add(core, Request("image", Prompt((5,) * 300, None, (image,), places), other_params(), 0))
        with pytest.raises(RunLostError, match="encoding images: MemoryError: full"):
            run(core)
        assert not sink


def test_a_new_cache_is_waited_for_before_a_call_can_consume_it() -> None:
    executor = WaitingExecutor()
    assert CachedWorker(executor).run(AllocateCache(4, "float32")) is None
    assert executor.num_waits == 1
