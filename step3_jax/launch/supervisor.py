"""Watches running ranks: shows what they write, ends all when one fails, and says which one and why."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType

from step3_jax.launch.line import Connection, Event, Message, unpack_output
from step3_jax.launch.log import Log
from step3_jax.launch.place import Rank

# What ssh says of a host that it lost, and so do we.
LOST_HOST_CODE = 255
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why all are ended. `rank` is None where a host failed and not one rank."""

    text: str
    code: int
    rank: int | None = None


class Supervisor:
    """Runs until no rank is left."""

    def __init__(
        self,
        connections: Sequence[Connection],
        ranks: Sequence[Rank],
        inbox: queue.SimpleQueue[Event],
        log: Log,
        *,
        deadline_s: float,
        grace_s: float,
    ) -> None:
        """Begins after the ranks were started.

        Args:
          connections: The hosts, in the order that the ranks name them.
          ranks: All that were started.
          inbox: Gets the events of the connections.
          log: Shows the output.
          deadline_s: Silence after which a host counts as lost.
          grace_s: From the first signal to SIGKILL.
        """
        self._connections = list(connections)
        self._ranks = {rank.rank: rank for rank in ranks}
        self._running = set(self._ranks)
        self._inbox = inbox
        self._log = log
        self._deadline_s = deadline_s
        self._grace_s = grace_s
        self._failure: Failure | None = None
        self._signal: int | None = None
        self._give_up_at = float("inf")
        self._ended_by_us = 0

    def run(self) -> int:
        """Watches to the end.

        Returns:
          0 if all ranks ended with 0; the code of the first that did not (128 + n if signal n ended it); 128 + n if
          signal n ended the launcher; 255 if a host was lost.

        Raises:
          BrokenPipeError: If the reader of standard output left.
        """
        while self._running and time.monotonic() < self._give_up_at:
            try:
                event = self._inbox.get(timeout=min(1.0, self._deadline_s / 5))
            except queue.Empty:
                # Only now: what came while this thread was busy has been counted.
                self._check_silence()
                continue
            self._take(event)
            if self._inbox.empty():
                self._check_silence()
        for connection in self._connections:
            if left := self._running_on(connection):
                self._log.note(f"{connection.host} did not confirm the end of rank {_join(left)}")
        return self._report()

    def _take(self, event: Event) -> None:
        message, connection = event.message, event.connection
        kind = message["kind"]
        if connection is None:
            self._interrupt(message["signal"])
        elif kind == "output":
            self._log.push(message["rank"], connection.host, message["stream"], unpack_output(message))
        elif kind == "ended":
            self._end_of_rank(connection, message["rank"], message["code"])
        elif kind == "noise":
            self._log.note_host(connection.host, message["text"])
        elif kind == "failed":
            self._fail(Failure(f"{connection.host}: {message['text']}", 1))
        elif kind == "closed" and (left := self._running_on(connection)):
            said = connection.last_noise()
            self._lose(
                connection,
                f"the connection to {connection.host} ended (exit code {message['code']}{': ' + said if said else ''}) "
                f"while rank {_join(left)} ran there",
            )

    def _end_of_rank(self, connection: Connection, rank: int, code: int) -> None:
        self._log.finish(rank, connection.host)
        self._running.discard(rank)
        if self._failure is None and self._signal is None:
            if code != 0:
                role = self._ranks[rank].role
                what = f"rank {rank} ({connection.host}{'' if role == '-' else ', ' + role}) {_describe(code)}"
                self._fail(Failure(what, 128 - code if code < 0 else code, rank))
        else:
            self._ended_by_us += 1

    def _check_silence(self) -> None:
        for connection in self._connections:
            silence_s = time.monotonic() - connection.heard_at
            left = self._running_on(connection)
            if left and silence_s > self._deadline_s:
                connection.kill()
                self._lose(
                    connection,
                    f"{connection.host} has not been heard for {silence_s:.0f} s while rank {_join(left)} ran there: the "
                    f"machine or the network to it is gone (if it still runs, it ends its ranks by itself within "
                    f"{self._deadline_s + self._grace_s:.0f} s)",
                )

    def _lose(self, connection: Connection, text: str) -> None:
        self._running -= set(self._running_on(connection))
        self._fail(Failure(text, LOST_HOST_CODE))

    def _fail(self, failure: Failure) -> None:
        if self._failure is None and self._signal is None:
            self._failure = failure
            if self._running:
                self._log.note(f"{failure.text}; ending rank {_join(self._running)}")
            self._end_all(signal.SIGTERM, self._grace_s)

    def _interrupt(self, number: int) -> None:
        name = signal.Signals(number).name
        if self._signal is not None:
            self._log.note(f"{name} again: killing rank {_join(self._running)}")
            self._end_all(signal.SIGKILL, 0)
            return
        self._signal = number
        self._log.interrupt()
        self._log.note(f"{name}: ending rank {_join(self._running)}, for {self._grace_s:g} s at most")
        self._end_all(number, self._grace_s)

    def _end_all(self, number: int, grace_s: float) -> None:
        # JAX's coordination service makes ranks deaf to SIGTERM: the keeper kills after the grace period.
        for connection in self._connections:
            if not connection.is_closed:
                connection.send(Message(kind="end", signal=number, seconds=grace_s))
        self._give_up_at = min(self._give_up_at, time.monotonic() + grace_s + self._deadline_s)

    def _running_on(self, connection: Connection) -> list[int]:
        index = self._connections.index(connection)
        return sorted(rank for rank in self._running if self._ranks[rank].host == index)

    def _report(self) -> int:
        if self._failure is None:
            return 0 if self._signal is None else 128 + self._signal
        failure = self._failure
        tail = [] if failure.rank is None else self._log.tail(failure.rank)
        self._log.note(failure.text + (", its last lines:" if tail else ""))
        for line in tail:
            self._log.note(f"  | {line}")
        if self._ended_by_us:
            self._log.note(f"ended the other {self._ended_by_us} rank(s)")
        return failure.code


@contextlib.contextmanager
def catch_signals(inbox: queue.SimpleQueue[Event]) -> Iterator[None]:
    """Turns signals that would end this process into events. Does nothing outside of the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def put(number: int, frame: FrameType | None) -> None:
        inbox.put(Event(None, Message(kind="signal", signal=number)))

    before = {number: signal.signal(number, put) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def send_beats(connections: Sequence[Connection], every_s: float) -> Iterator[None]:
    """Tells the keepers that we live, from a thread of its own: showing output may block for as long as it likes."""
    is_over = threading.Event()

    def beat() -> None:
        while not is_over.wait(every_s):
            for connection in connections:
                if not connection.is_closed:
                    connection.send(Message(kind="beat"))

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()


def _describe(code: int) -> str:
    if code >= 0:
        return f"failed with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = "unknown"
    hint = ": out of memory?" if -code == signal.SIGKILL else ""
    return f"was ended by signal {-code} ({name}{hint})"


def _join(ranks: Sequence[int] | set[int]) -> str:
    return ", ".join(str(rank) for rank in sorted(ranks)) or "none"
