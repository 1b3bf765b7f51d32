"""The loop: its learning rate, its budget, and how it resumes after an interruption."""

from __future__ import annotations

import itertools
import json
import pathlib
import types
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from step3_jax.train import loop
from step3_jax.train.loop import Schedule, prefetch, train
from step3_jax.train.optimizer import make_optimizer
from step3_jax.train.step import TrainState, apply_gradients

SECOND = 1 / 60


@pytest.fixture(autouse=True)
def _one_second_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that advances by one second at each reading: a step is timed before and after."""
    ticks = itertools.count()
    clock = types.SimpleNamespace(perf_counter=lambda: float(next(ticks)), process_time=lambda: 0.0)
    monkeypatch.setattr(loop, "time", clock)


def _start() -> tuple[TrainState, Callable[..., tuple[TrainState, dict[str, jax.Array]]], list[float]]:
    """A first state, a step that learns [1, 2, 3], and the rates it was called with."""
    params = {"bias": jnp.zeros((3,))}
    optimizer = make_optimizer(params, lambda path, leaf: False, weight_decay=0.0, clip_norm=1e9)
    state = TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))
    rates: list[float] = []

    def step(state: TrainState, batch: np.ndarray, rate: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        rates.append(float(rate))
        difference = state.params["bias"] - jnp.asarray(batch)
        return apply_gradients(state, {"bias": difference}, optimizer, rate), {"loss": jnp.sum(difference**2)}

    return state, step, rates


def _batches() -> Iterator[np.ndarray]:
    return itertools.repeat(np.array([1.0, 2.0, 3.0], np.float32))


SCHEDULE = Schedule(0.5, warmup=0.2, decay=0.5)


def test_rate_warms_up_stays_and_falls_to_zero() -> None:
    schedule = Schedule(2.0, warmup=0.1, decay=0.5)
    rates = [schedule.rate(done) for done in (0.0, 0.05, 0.1, 0.3, 0.5, 0.75, 1.0, 1.1)]
    np.testing.assert_allclose(rates, [0.0, 1.0, 2.0, 2.0, 2.0, 1.0, 0.0, 0.0])


def test_budget_is_the_time_of_the_steps(tmp_path: pathlib.Path) -> None:
    state, step, rates = _start()
    last = train(state, step, _batches(), tmp_path, minutes=6 * SECOND, schedule=SCHEDULE)
    assert int(last.step) == 6
    np.testing.assert_allclose(rates, [SCHEDULE.rate(used / 6) for used in range(6)], rtol=1e-6)


def test_an_interrupted_run_ends_as_one_that_was_not(tmp_path: pathlib.Path) -> None:
    state, step, _ = _start()
    whole = train(state, step, _batches(), tmp_path / "whole", minutes=6 * SECOND, schedule=SCHEDULE)

    def failing(state: TrainState, batch: np.ndarray, rate: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        if int(state.step) == 5:
            raise RuntimeError("the power is gone")
        return step(state, batch, rate)

    options = {"minutes": 6 * SECOND, "schedule": SCHEDULE, "save_minutes": 3.5 * SECOND}
    with pytest.raises(RuntimeError, match="power"):
        train(state, failing, _batches(), tmp_path / "parts", **options)
    state, step, rates = _start()
    resumed = train(state, step, _batches(), tmp_path / "parts", **options)
    assert len(rates) == 2  # the checkpoint is of the fourth second
    assert int(resumed.step) == 6
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_finished_run_is_not_trained_further(tmp_path: pathlib.Path) -> None:
    state, step, rates = _start()
    first = train(state, step, _batches(), tmp_path, minutes=3 * SECOND, schedule=SCHEDULE)
    again = train(state, step, _batches(), tmp_path, minutes=3 * SECOND, schedule=SCHEDULE)
    assert len(rates) == 3
    np.testing.assert_array_equal(first.params["bias"], again.params["bias"])


def test_log_has_the_means_since_the_line_before(tmp_path: pathlib.Path) -> None:
    state, step, _ = _start()
    train(state, step, _batches(), tmp_path, minutes=4 * SECOND, schedule=SCHEDULE, log_every=2)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert [line["used_s"] for line in lines] == [2.0, 4.0]
    assert lines[1]["loss"] < lines[0]["loss"]
    # Warm-up starts at rate zero, so that both steps of the first line saw the first loss.
    np.testing.assert_allclose(lines[0]["loss"], 14.0, rtol=1e-6)


def test_prefetch_keeps_the_order_and_hands_errors_over() -> None:
    def batches() -> Iterator[int]:
        yield from range(5)
        raise ValueError("no more data")

    ready = prefetch(batches())
    assert [next(ready) for _ in range(5)] == list(range(5))
    with pytest.raises(ValueError, match="no more data"):
        next(ready)
