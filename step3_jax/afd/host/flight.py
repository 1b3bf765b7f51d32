"""Stages in flight: every dispatched stage is noted, waits have a deadline, and a timeline can be recorded."""

from __future__ import annotations

import collections
import queue
import threading
import time

import jax
from jaxtyping import Array

from step3_jax.timeline.event import LANES, Event, Lane, Stage

# Seconds between two polls: the first pause, and the longest.
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 2e-5, 2e-3
# Where the next stage is dispatched only then.
_LONGEST_COPY_PAUSE_S = 2e-4


class Flight:
    """Stages that were started and may not have ended.

    Attributes:
      ffn_wait_s: Seconds in which attention had nothing to compute because the FFN side had not returned its result
        yet. Measured while the host waits for stages, which is nearly all the time, to the length of a pause between
        two polls.
    """

    def __init__(self, deadline_s: float) -> None:
        """Starts with nothing in flight.

        Args:
          deadline_s: How long a stage may take once all before it have ended.

        Raises:
          ValueError: If the deadline is not positive.
        """
        if not deadline_s > 0:
            raise ValueError(f"the deadline is {deadline_s:g} s; it must be more than 0")
        self.ffn_wait_s = 0.0
        self._deadline_s = deadline_s
        self._waiting: collections.deque[tuple[Stage, Array]] = collections.deque()
        self._recorder: Recorder | None = None

    def start_recording(self) -> None:
        """Records all stages from now on."""
        self._recorder = Recorder()

    def stop_recording(self) -> list[Event]:
        """Ends a recording; returns its events, sorted by end time."""
        recorder, self._recorder = self._recorder, None
        return recorder.stop() if recorder is not None else []

    def push(self, stage: Stage, array: Array, limit: int) -> None:
        """Notes a stage that was dispatched.

        Args:
          stage: What it is.
          array: A result of it that is not donated.
          limit: Stages that may be in flight; waits for the oldest if there are more, so that a fast host does not fill
            the devices' memory with work that is far from its turn.

        Raises:
          TimeoutError: As `drain`.
        """
        self._waiting.append((stage, array))
        if self._recorder is not None:
            self._recorder.push(stage, array)
        while len(self._waiting) > limit:
            self._wait_for_oldest()

    def drain(self) -> None:
        """Waits until nothing is in flight.

        Raises:
          TimeoutError: If a stage has not ended by its deadline; the message names it. All stages in flight are
            forgotten.
        """
        while self._waiting:
            self._wait_for_oldest()

    def wait_for(self, array: Array) -> None:
        """Waits for a result that was noted.

        Raises:
          TimeoutError: As `drain`.
        """
        while self._waiting and not is_ready(array):
            self._wait_for_oldest()

    def wait_alone(self, stage: Stage, array: Array) -> None:
        """Waits for one stage, whatever else is in flight.

        Raises:
          TimeoutError: As `drain`.
        """
        self._wait(stage, array, _LONGEST_COPY_PAUSE_S)

    def _wait_for_oldest(self) -> None:
        self._wait(*self._waiting[0], _LONGEST_PAUSE_S)
        self._waiting.popleft()

    def _wait(self, stage: Stage, array: Array, longest_pause_s: float) -> None:
        begin = now = time.monotonic()
        pause = _SHORTEST_PAUSE_S
        while not is_ready(array):
            if now - begin > self._deadline_s:
                num_left = sum(other is not array for _, other in self._waiting)
                self._waiting.clear()
                raise TimeoutError(
                    f"{stage} has not ended within {self._deadline_s:g} s; {num_left} more stages wait for it. If the "
                    "devices are merely slow, raise the deadline (--afd-deadline)"
                )
            is_held_up = self._is_attention_held_up(stage)
            time.sleep(pause)
            pause = min(2 * pause, longest_pause_s)
            before, now = now, time.monotonic()
            if is_held_up:
                self.ffn_wait_s += now - before

    def _is_attention_held_up(self, awaited: Stage) -> bool:
        """Whether the next attention step waits for the FFN side's result, while the host waits for a stage.

        Attention runs its steps in order. If it has none left, the next one is dispatched once that stage has ended.
        """
        coming: set[Stage] = set()
        for stage, array in self._waiting:
            if stage.lane == "to_attention" and not is_ready(array):
                coming.add(stage)
            elif stage.lane == "attention" and not is_ready(array):
                return stage._replace(lane="to_attention", layer=stage.layer - 1) in coming
        return awaited.lane != "attention"


def is_ready(array: Array) -> bool:
    """Whether an array has been computed; a failed computation counts."""
    return bool(array.is_ready())  # type: ignore[attr-defined]  # Every concrete array has it.


class Recorder:
    """Waits for the results of each lane in its own thread, and records when they arrived.

    A stage starts when its inputs have arrived and the one before it on its lane has ended.
    """

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._queues: dict[str, queue.SimpleQueue[tuple[Stage, Array, float] | None]] = {
            lane: queue.SimpleQueue() for lane in LANES
        }
        self._ends: dict[str, list[tuple[Stage, float, float]]] = {lane: [] for lane in LANES}
        self._threads = [threading.Thread(target=self._follow, args=(lane,), daemon=True) for lane in LANES]
        for thread in self._threads:
            thread.start()

    def push(self, stage: Stage, array: Array) -> None:
        """Takes a stage to follow."""
        self._queues[stage.lane].put((stage, array, time.perf_counter() - self._begin))

    def stop(self) -> list[Event]:
        """Waits for all stages; returns their events, sorted by end time."""
        for own in self._queues.values():
            own.put(None)
        for thread in self._threads:
            thread.join()
        return reconstruct(self._ends)

    def _follow(self, lane: str) -> None:
        while (item := self._queues[lane].get()) is not None:
            stage, array, started = item
            jax.block_until_ready(array)
            self._ends[lane].append((stage, started, time.perf_counter() - self._begin))


def reconstruct(ends: dict[str, list[tuple[Stage, float, float]]]) -> list[Event]:
    """Events from the times at which stages were dispatched and ended, in order on each lane.

    Args:
      ends: For each lane, its stages with both times, in seconds.
    """
    before: dict[Lane, Lane] = {
        "to_ffn": "attention",
        "ffn": "to_ffn",
        "to_attention": "ffn",
        "attention": "to_attention",
    }
    end_of = {stage: end for items in ends.values() for stage, _, end in items}
    events = []
    for items in ends.values():
        previous = 0.0
        for stage, started, end in items:
            # An attention step adds the FFN output of the layer before.
            layer = stage.layer - 1 if stage.lane == "attention" else stage.layer
            needed = end_of.get(stage._replace(lane=before[stage.lane], layer=layer), 0.0)
            start = min(max(previous, started, needed), end)
            events.append(Event(stage, start, end))
            previous = end
    return sorted(events, key=_end)


def _end(event: Event) -> float:
    return event.end_s
