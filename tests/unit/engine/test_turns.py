"""Threads that share an engine: whichever steps, all others have their outputs when that step ends."""

from __future__ import annotations

import threading
import time

import pytest

from step3_jax.engine.config import EngineConfig
from step3_jax.engine.engine import Engine
from step3_jax.engine.grammar import ConstraintMaker
from step3_jax.engine.request import OutputSink, Prompt, Request, SequenceOutput
from step3_jax.sampling.params import SamplingParams

NUM_STEPS = 4


class TwoRequests:
    """A core whose request "short" gets a token in each step, and "long" one only in the last step.

    Attributes:
      taken: Set by the test for each token of "short" that it has.
      long_steps: Set once the thread of "long" steps.
      late: Steps before which "short" did not have the token of the step before.
    """

    def __init__(self) -> None:
        self.config = EngineConfig()
        self.has_work = True
        self.taken = [threading.Event() for _ in range(NUM_STEPS)]
        self.long_steps = threading.Event()
        self.late: list[int] = []
        self._sinks: dict[str, OutputSink] = {}
        self._count = 0

    def check(self, request: Request) -> None:
        pass

    def add(self, request: Request, sink: OutputSink) -> None:
        self._sinks[request.request_id] = sink

    def abort(self, request_id: str, index: int | None = None) -> None:
        pass

    def settle(self) -> None:
        pass

    def step(self) -> None:
        if threading.current_thread().name == "long":
            self.long_steps.set()
            if self._count == 1:
                # The other one comes to wait for this step.
                time.sleep(0.2)
            elif self._count > 1 and not self.taken[self._count - 1].wait(5):
                self.late.append(self._count)
        self._count += 1
        finish = "length" if self._count == NUM_STEPS else ""
        self._sinks["short"].put(SequenceOutput("short", 0, (self._count,), finish))
        if finish:
            self._sinks["long"].put(SequenceOutput("long", 0, (9,), finish))


def request(name: str) -> Request:
    return Request(name, Prompt((1,)), SamplingParams(max_tokens=NUM_STEPS), 0)


def test_a_thread_has_its_outputs_while_another_goes_on_stepping():
    core = TwoRequests()
    engine = Engine(core, None, (), ConstraintMaker(None, 8, ()))
    thread = threading.Thread(target=lambda: list(engine.run([request("long")])), name="long")
    tokens: list[int] = []
    for event in engine.run([request("short")]):
        assert event.piece is not None
        tokens += event.piece.token_ids
        if len(tokens) == 1:
            thread.start()
            assert core.long_steps.wait(5)
        core.taken[len(tokens) - 1].set()
    thread.join()
    assert tokens == [1, 2, 3, 4]
    assert core.late == []


def test_a_step_that_fails_leaves_the_turn_to_others(monkeypatch):
    core = TwoRequests()
    engine = Engine(core, None, (), ConstraintMaker(None, 8, ()))

    def fail() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(core, "step", fail)
        with pytest.raises(KeyboardInterrupt):
            next(engine.run([request("short")]))
    assert next(engine.run([request("short")])).piece.token_ids == (1,)
