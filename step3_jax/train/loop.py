"""The training loop: a time budget, a learning rate that follows it, checkpoints to resume from, a progress bar."""

from __future__ import annotations

import json
import pathlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree
from tqdm import tqdm

from step3_jax.train.step import TrainState

Metrics = dict[str, jax.Array]
StepFunction = Callable[[TrainState, PyTree, jax.Array], tuple[TrainState, Metrics]]


@dataclass(frozen=True)
class Schedule:
    """Learning rate over the time budget: linear warm-up, level, linear to zero.

    Attributes:
      peak: Highest rate.
      warmup: Share of the budget until the peak.
      decay: Share of the budget, at its end, in which the rate falls to zero.
    """

    peak: float
    warmup: float = 0.02
    decay: float = 0.6

    def rate(self, done: float) -> float:
        """The rate when the share `done` of the budget is used."""
        return self.peak * max(min(1.0, done / self.warmup, (1 - done) / self.decay), 0.0)


def prefetch(batches: Iterator[PyTree], size: int = 2) -> Iterator[PyTree]:
    """Makes the next batches in a thread while the step runs."""
    ready: queue.Queue[PyTree | Exception] = queue.Queue(size)

    def fill() -> None:
        try:
            for batch in batches:
                ready.put(batch)
        except Exception as error:  # passed to the loop, which raises it
            ready.put(error)

    threading.Thread(target=fill, daemon=True, name="prefetch").start()
    while True:
        batch = ready.get()
        if isinstance(batch, Exception):
            raise batch
        yield batch


def train(
    state: TrainState,
    step: StepFunction,
    batches: Iterator[PyTree],
    folder: pathlib.Path,
    *,
    minutes: float,
    schedule: Schedule,
    save_minutes: float = 4.0,
    log_every: int = 20,
) -> TrainState:
    """Trains until the budget is used, resuming from the last checkpoint in `folder`.

    The budget counts the time spent in steps, over all runs: an interrupted run continues from its last checkpoint.
      Metrics are appended to `folder/log.jsonl`.

    Args:
      state: First state; its shapes are those of the checkpoint.
      step: (state, batch, rate) -> (state, metrics), jitted by the caller.
      batches: Endless source of batches.
      folder: For checkpoints and the log.
      minutes: Budget.
      schedule: Learning rate.
      save_minutes: Time between checkpoints.
      log_every: Steps between two log lines.

    Returns:
      The last state; it is saved.
    """
    folder.mkdir(parents=True, exist_ok=True)
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    with ocp.CheckpointManager((folder / "checkpoints").absolute(), options=options) as manager:
        used = 0.0
        if manager.latest_step() is not None:
            last = manager.latest_step()
            restored = manager.restore(
                last,
                args=ocp.args.Composite(state=ocp.args.StandardRestore(state), progress=ocp.args.JsonRestore()),
            )
            state, used = restored["state"], float(restored["progress"]["used_s"])

        def save() -> None:
            number = int(state.step)
            if number != manager.latest_step():
                manager.save(
                    number,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave({"used_s": used})
                    ),
                )

        budget = minutes * 60
        ready = prefetch(batches)
        cpu_start = time.process_time()
        bar = tqdm(total=round(budget), initial=round(used), unit="s", desc=folder.name, dynamic_ncols=True)
        sums: dict[str, list[jax.Array]] = {}
        last_save = used
        while used < budget:
            start = time.perf_counter()
            rate = schedule.rate(used / budget)
            state, metrics = step(state, next(ready), jnp.float32(rate))
            for name, value in metrics.items():
                sums.setdefault(name, []).append(value)
            number = int(state.step)  # waits for the step, so that `used` is correct
            used += time.perf_counter() - start
            bar.update(round(used) - bar.n)
            if number % log_every == 0:
                means = {name: float(np.mean(jax.device_get(values))) for name, values in sums.items()}
                sums = {}
                bar.set_postfix({name: f"{value:.3g}" for name, value in means.items()})
                line = {
                    "step": number,
                    "used_s": round(used, 1),
                    "cpu_s": round(time.process_time() - cpu_start, 1),
                    "rate": rate,
                }
                with (folder / "log.jsonl").open("a", encoding="utf-8") as log:
                    log.write(json.dumps(line | means) + "\n")
            if used - last_save > save_minutes * 60:
                save()
                last_save = used
        save()
        bar.close()
    return state
