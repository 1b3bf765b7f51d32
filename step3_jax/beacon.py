"""Where a process of a run is, reported through a small mapped file to the keeper that started it (`launch/keeper.py`).

The process writes, the keeper reads: neither waits for the other. A process that is stopped, or stuck in native
code that never lets another thread run, stops beating.
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
from typing import BinaryIO, NamedTuple

from step3_jax.rank import BEACON

# While the tiny model was loaded, traced, compiled and run, the longest pause between two beats was 0.8 s, and 1.0 s with
# two more programs on the same two cores: XLA compiles and waits without Python's lock, and tracing releases it often.
BEAT_S = 0.2
_BEATS = struct.Struct("=Q")
# Odd while the rest is being written.
_NUMBER = struct.Struct("=Q")
# Process, call, step, exchange, whether a call of this name has returned before, bytes of the place.
_STATE = struct.Struct("=Qqqq?H")
_NUMBER_AT = _BEATS.size
_STATE_AT = _NUMBER_AT + _NUMBER.size
_PLACE_AT = _STATE_AT + _STATE.size
_MAX_PLACE_BYTES = 96
_FILE_BYTES = _PLACE_AT + _MAX_PLACE_BYTES
# A write takes microseconds; one that does not end belongs to a process that was stopped in the middle of it.
_MAX_TRIES = 1000


class Reading(NamedTuple):
    """What a process has reported.

    Attributes:
      beats: Grows while the process runs.
      changes: Grows when anything below changes.
      process_id: The process; 0 before its first report.
      place: The call it is inside; empty outside all calls.
      call: Number of its last call, from 1; 0 before the first.
      is_repeated: Whether a call of that name has returned before, so that this one need not compile.
      step: Number of its decode step, where steps are traced; else -1.
      exchange: The last exchange with the other role that it has seen, where steps are traced; else -1.
    """

    beats: int
    changes: int
    process_id: int
    place: str
    call: int
    is_repeated: bool
    step: int
    exchange: int

    def __str__(self) -> str:
        if not self.call:
            return "at the start"
        words = [f"in {self.place}, call {self.call}" if self.place else f"after call {self.call}"]
        words += [f"step {self.step}"] if self.step >= 0 else []
        words += [f"last exchange {self.exchange}"] if self.exchange >= 0 else []
        return ", ".join(words)


class Beacon:
    """The process's side. Without a keeper its methods do nothing."""

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        """Opens the file, and starts to beat if nothing in this process does yet.

        Args:
          path: Path of a `BeaconFile`; None for none.

        Raises:
          OSError: If it cannot be opened.
          ValueError: If it is not a beacon.
        """
        self._memory: mmap.mmap | None = None
        self._lock = threading.Lock()
        # Calls in progress, and the names of those that have returned.
        self._entered: dict[int, str] = {}
        self._returned: set[str] = set()
        if path is None:
            return
        with pathlib.Path(path).open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _FILE_BYTES)
        if _read(self._memory).process_id != os.getpid():
            self._write()
            threading.Thread(target=self._beat, name="beacon", daemon=True).start()

    @staticmethod
    def from_environment(environment: Mapping[str, str] | None = None) -> Beacon:
        """The beacon that STEP3_BEACON names; one that does nothing if it is not set.

        May be called at several places of a process: they write to the same file.

        Args:
          environment: Where to read the variable; the process's environment if absent.

        Raises:
          OSError: If it names a file that cannot be opened.
        """
        return Beacon((os.environ if environment is None else environment).get(BEACON) or None)

    def enter(self, place: str) -> int:
        """Reports which call comes next, such as "prefill": a wait in it is reported under this name.

        Returns:
          Its number, for `leave`.
        """
        if self._memory is None:
            return 0
        call = _read(self._memory).call + 1
        self._entered[call] = place
        self._write(place=place, call=call, is_repeated=place in self._returned)
        return call

    def leave(self, call: int) -> None:
        """Reports that a call has returned. If another one was entered after it, that remains the place."""
        if self._memory is not None:
            self._returned.add(self._entered.pop(call))
            if _read(self._memory).call == call:
                self._write(place="")

    def step(self, number: int, exchange: int) -> None:
        """Reports progress inside a call.

        Args:
          number: Number of the step.
          exchange: Number of the last exchange with the other role that was seen.
        """
        self._write(step=number, exchange=exchange)

    def _write(
        self,
        *,
        place: str | None = None,
        call: int | None = None,
        is_repeated: bool | None = None,
        step: int | None = None,
        exchange: int | None = None,
    ) -> None:
        memory = self._memory
        if memory is None:
            return
        with self._lock:
            before = _read(memory)
            name = (before.place if place is None else place).encode()[:_MAX_PLACE_BYTES]
            values = (
                os.getpid(),
                before.call if call is None else call,
                before.step if step is None else step,
                before.exchange if exchange is None else exchange,
                before.is_repeated if is_repeated is None else is_repeated,
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
            # Linux kills it together with its keeper; elsewhere it must notice by itself.
            if os.getppid() != parent:
                os.kill(os.getpid(), signal.SIGKILL)


class BeaconFile:
    """The keeper's side."""

    def __init__(self, file: BinaryIO) -> None:
        """Makes an open file the beacon of a process that has not started. It may be unnamed: the process opens /dev/fd/N.

        Raises:
          OSError: If it cannot be written.
        """
        file.write(bytes(_FILE_BYTES))
        file.flush()
        self._memory = mmap.mmap(file.fileno(), _FILE_BYTES)
        _STATE.pack_into(self._memory, _STATE_AT, 0, 0, -1, -1, False, 0)

    def read(self) -> Reading:
        """The process's last report."""
        return _read(self._memory)

    def close(self) -> None:
        """Releases the file."""
        self._memory.close()


def read_beacon(path: str | os.PathLike[str]) -> Reading:
    """The last report of the process with the beacon at `path`.

    Raises:
      OSError: If there is no such file.
      ValueError: If it is not a beacon.
    """
    data = pathlib.Path(path).read_bytes()
    if len(data) != _FILE_BYTES:
        raise ValueError(f"{path} is not a beacon: it has {len(data)} bytes, and a beacon has {_FILE_BYTES}")
    return _read(data)


def _read(memory: mmap.mmap | bytes) -> Reading:
    for _ in range(_MAX_TRIES):
        [number] = _NUMBER.unpack_from(memory, _NUMBER_AT)
        process_id, call, step, exchange, is_repeated, length = _STATE.unpack_from(memory, _STATE_AT)
        place = bytes(memory[_PLACE_AT : _PLACE_AT + min(length, _MAX_PLACE_BYTES)])
        if number % 2 == 0 and _NUMBER.unpack_from(memory, _NUMBER_AT)[0] == number:
            break
    [beats] = _BEATS.unpack_from(memory, 0)
    return Reading(beats, number // 2, process_id, place.decode(errors="ignore"), call, is_repeated, step, exchange)
