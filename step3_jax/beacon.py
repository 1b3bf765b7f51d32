"""Where a worker is, told through a small mapped file to the supervisor beside it (`afd/supervisor.py`).

The worker writes, the supervisor reads: no call of either waits for the other. A worker that is stopped, or caught in
native code that never lets another thread run, stops beating.
"""

from __future__ import annotations

import mmap
import os
import pathlib
import signal
import struct
import threading
import time
from collections.abc import Mapping
from typing import NamedTuple

# Path of the file; set for a worker by its supervisor.
BEACON = "STEP3_BEACON"
# While the tiny model was loaded, traced, compiled and run, the longest pause between two beats was 0.8 s, and 1.0 s with
# two more programs on the same two cores: XLA compiles and waits without Python's lock, and tracing gives it up often.
BEAT_S = 0.2
START = "the start"
_BEATS = struct.Struct("=Q")
# Odd while the rest is being written.
_NUMBER = struct.Struct("=Q")
# Process, step, exchange, time of entering, bytes of the place.
_STATE = struct.Struct("=QqqdH")
_NUMBER_AT = _BEATS.size
_STATE_AT = _NUMBER_AT + _NUMBER.size
_PLACE_AT = _STATE_AT + _STATE.size
_MAX_PLACE_BYTES = 96
_FILE_BYTES = _PLACE_AT + _MAX_PLACE_BYTES
# A write takes microseconds; one that does not end is that of a process that was stopped in the middle of it.
_MAX_TRIES = 1000


class Reading(NamedTuple):
    """What a worker has said of itself.

    Attributes:
      beats: Grows while the process runs.
      changes: Grows with all that follows.
      process_id: The worker; 0 before it has said anything.
      place: The call it is inside of; empty outside of all.
      step: Number of its step; -1 before the first.
      exchange: The last exchange it has seen; -1 before the first.
      since_s: CLOCK_MONOTONIC when it entered the call or left the last one.
    """

    beats: int
    changes: int
    process_id: int
    place: str
    step: int
    exchange: int
    since_s: float

    def __str__(self) -> str:
        if not self.process_id:
            return f"in {START}"
        words = [f"in {self.place}" if self.place else "between two calls"]
        words += [f"step {self.step}"] if self.step >= 0 else []
        words += [f"last exchange {self.exchange}"] if self.exchange >= 0 else []
        return ", ".join(words)


class Beacon:
    """The worker's side. Without a supervisor all of its methods do nothing."""

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        """Opens the file, and begins to beat if nothing in this process does yet.

        Args:
          path: Of a `BeaconFile`; None for none.

        Raises:
          OSError: If it cannot be opened.
          ValueError: If it is no beacon.
        """
        self._memory: mmap.mmap | None = None
        self._lock = threading.Lock()
        if path is None:
            return
        with pathlib.Path(path).open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _FILE_BYTES)
        if _read(self._memory).process_id != os.getpid():
            self._write(place="")
            threading.Thread(target=self._beat, name="beacon", daemon=True).start()

    @staticmethod
    def from_environment(environment: Mapping[str, str] | None = None) -> Beacon:
        """The beacon that STEP3_BEACON names; one that does nothing where it is not set.

        May be called at several places of a process: they write to the same file.

        Args:
          environment: Where the variable is read from; that of the process if absent.

        Raises:
          OSError: If it names a file that cannot be opened.
        """
        return Beacon((os.environ if environment is None else environment).get(BEACON) or None)

    def enter(self, place: str) -> None:
        """Says which call comes next, such as "prefill": a wait in it is named by it."""
        self._write(place=place)

    def leave(self) -> None:
        """Says that the call has returned."""
        self._write(place="")

    def step(self, number: int, exchange: int) -> None:
        """Says how far the work is.

        Args:
          number: Of the step, or an array's one element.
          exchange: Number of the last exchange with the other role that was seen.
        """
        self._write(step=int(number), exchange=int(exchange))

    def _write(self, *, place: str | None = None, step: int | None = None, exchange: int | None = None) -> None:
        memory = self._memory
        if memory is None:
            return
        with self._lock:
            before = _read(memory)
            name = (before.place if place is None else place).encode()[:_MAX_PLACE_BYTES]
            values = (
                os.getpid(),
                before.step if step is None else step,
                before.exchange if exchange is None else exchange,
                before.since_s if place is None else time.monotonic(),
                len(name),
            )
            _NUMBER.pack_into(memory, _NUMBER_AT, 2 * before.changes + 1)
            _STATE.pack_into(memory, _STATE_AT, *values)
            memory[_PLACE_AT : _PLACE_AT + len(name)] = name
            _NUMBER.pack_into(memory, _NUMBER_AT, 2 * before.changes + 2)

    def _beat(self) -> None:
        memory, parent = self._memory, os.getppid()
        beats = 0
        while memory is not None:
            beats += 1
            _BEATS.pack_into(memory, 0, beats)
            time.sleep(BEAT_S)
            # Linux kills it together with its supervisor; elsewhere it has to notice.
            if os.getppid() != parent:
                os.kill(os.getpid(), signal.SIGKILL)


class BeaconFile:
    """The supervisor's side."""

    def __init__(self, path: pathlib.Path) -> None:
        """Makes the file of a worker that has not started.

        Raises:
          OSError: If it cannot be made.
        """
        self.path = path
        path.write_bytes(bytes(_FILE_BYTES))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _FILE_BYTES)
        _STATE.pack_into(self._memory, _STATE_AT, 0, -1, -1, time.monotonic(), 0)

    def read(self) -> Reading:
        """What the worker has said last."""
        return _read(self._memory)

    def close(self) -> None:
        """Removes the file."""
        self.path.unlink(missing_ok=True)
        self._memory.close()


def read_beacon(path: str | os.PathLike[str]) -> Reading:
    """What the worker with the beacon at `path` has said last.

    Raises:
      OSError: If there is no such file.
      ValueError: If it is no beacon.
    """
    data = pathlib.Path(path).read_bytes()
    if len(data) != _FILE_BYTES:
        raise ValueError(f"{path} is no beacon: it has {len(data)} bytes, and a beacon {_FILE_BYTES}")
    return _read(data)


def _read(memory: mmap.mmap | bytes) -> Reading:
    for _ in range(_MAX_TRIES):
        [number] = _NUMBER.unpack_from(memory, _NUMBER_AT)
        process_id, step, exchange, since_s, length = _STATE.unpack_from(memory, _STATE_AT)
        place = bytes(memory[_PLACE_AT : _PLACE_AT + min(length, _MAX_PLACE_BYTES)])
        if number % 2 == 0 and _NUMBER.unpack_from(memory, _NUMBER_AT)[0] == number:
            break
    [beats] = _BEATS.unpack_from(memory, 0)
    return Reading(beats, number // 2, process_id, place.decode(errors="ignore"), step, exchange, since_s)
