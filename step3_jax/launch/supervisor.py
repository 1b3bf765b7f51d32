"""Supervises running ranks: shows their output, ends all when one fails, and says which one and why (`watch.py`)."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType

from step3_jax.launch.line import Connection, Event, Message, unpack_bytes
from step3_jax.launch.log import Log
from step3_jax.launch.place import Rank
from step3_jax.launch.watch import Failure, Report, Watch
from step3_jax.rank import name_rank

# ssh's exit code for a lost host, and ours.
LOST_HOST_CODE = 255
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# How often the ranks are judged.
_TICK_S = 0.25
# Signals that another rank's failure does not cause.
_SUDDEN = {signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGTERM, signal.SIGINT}
# Ranks whose places are reported when another one fails.
_MAX_PLACES = 8


@dataclasses.dataclass(frozen=True)
class _Cause:
    """Why everything ends. `rank` is None if a host failed and not one rank."""

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
        rank_deadline_s: float,
        grace_s: float,
        shutdown_s: float = 0.0,
    ) -> None:
        """Starts after the ranks have been started.

        Args:
          connections: The hosts, in the order in which the ranks refer to them.
          ranks: All started ranks.
          inbox: Receives the events of the connections.
          log: Shows the output.
          deadline_s: Silence after which a host counts as lost.
          rank_deadline_s: The longest a rank may make no progress, see `Watch`.
          grace_s: Time from the first signal to SIGKILL.
          shutdown_s: Only rank 0 gets a signal, and has this long to end before the others get it. 0: all get it.
        """
        self._connections = list(connections)
        self._ranks = {rank.rank: rank for rank in ranks}
        self._running = set(self._ranks)
        self._inbox = inbox
        self._log = log
        self._deadline_s = deadline_s
        self._grace_s = grace_s
        self._shutdown_s = shutdown_s if 0 in self._ranks else 0.0
        names = {rank.rank: name_rank(rank.role, rank.rank, self._connections[rank.host].host) for rank in ranks}
        self._watch = Watch(names, deadline_s=rank_deadline_s)
        self._cause: _Cause | None = None
        self._signal: int | None = None
        self._end_others_at = float("inf")
        self._has_ended_well = False
        self._give_up_at = float("inf")
        self._ended_by_us = 0

    def run(self) -> int:
        """Watches to the end.

        Returns:
          0 if all ranks ended with 0; the code of the rank that failed (128 + n if signal n ended it), or 75 if it made
          no progress; 128 + n if signal n ended the launcher; 255 if a host was lost.

        Raises:
          BrokenPipeError: If the reader of standard output left.
        """
        before = time.monotonic()
        while self._running and time.monotonic() < self._give_up_at:
            try:
                self._take(self._inbox.get(timeout=_TICK_S))
            except queue.Empty:
                # Only now: events that arrived while this thread was busy have been counted.
                self._check_silence()
            if self._inbox.empty():
                self._check_silence()
            self._log.show_native()
            now = time.monotonic()
            # Time in which this process itself was stopped says nothing about the ranks.
            self._watch.pass_time(min(now - before, 2 * _TICK_S))
            before = now
            self._judge()
            if now > self._end_others_at:
                self._end_others_at = float("inf")
                self._end_all(signal.SIGTERM, self._grace_s)
        while not self._has_to_end() and self._watch.has_failure():
            # All have ended, and no cause will be reported any more.
            self._watch.pass_time(_TICK_S)
            self._judge()
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
            self._log.push(message["rank"], connection.host, message["stream"], unpack_bytes(message))
        elif kind == "reports":
            for rank, values in message["reports"]:
                self._watch.hear(rank, Report(*values))
        elif kind == "ended":
            self._end_of_rank(connection, message["rank"], message["code"])
        elif kind == "noise":
            self._log.note_host(connection.host, message["text"])
        elif kind == "failed":
            if not self._has_to_end():
                self._end_for(_Cause(f"{connection.host}: {message['text']}", 1))
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
        if self._has_to_end():
            self._ended_by_us += 1
            if rank == 0 and self._end_others_at < float("inf"):
                self._has_ended_well = code == 0
                self._end_others_at = 0.0
        elif code:
            self._watch.fail(self._explain(rank, code))
        else:
            self._watch.end(rank)

    def _explain(self, rank: int, code: int) -> Failure:
        """Why a rank has ended, as far as its exit code and last place say."""
        where = self._watch.where(rank)
        if code < 0:
            text = f"was killed ({_signal_name(-code)}{'; out of memory?' if -code == signal.SIGKILL else ''}), {where}"
            return Failure(rank, text, 128 - code, is_consequence=-code not in _SUDDEN)
        # A usage error; inside a call it may be JAX's exit code for a lost peer.
        is_mistake = code == 2 and not self._watch.is_inside(rank)
        return Failure(rank, f"failed with exit code {code}, {where}", code, is_consequence=not is_mistake)

    def _judge(self) -> None:
        if self._has_to_end() or (failure := self._watch.judge()) is None:
            return
        rank = failure.rank
        others = [other for other in self._ranks if other != rank]
        self._end_for(_Cause(f"{self._watch.name(rank)} {failure.text}", failure.code, rank), others)
        self._ended_by_us = sum(other not in self._running for other in others)

    def _end_for(self, cause: _Cause, others: Sequence[int] = ()) -> None:
        self._cause = cause
        self._log.note(cause.text + (f"; ending rank {_join(self._running)}" if self._running else ""))
        for rank in others[:_MAX_PLACES]:
            self._log.note(f"  {self._watch.name(rank)} was {self._watch.where(rank)}")
        self._log.blame(cause.rank)
        self._end_all(signal.SIGTERM, self._grace_s)

    def _check_silence(self) -> None:
        for connection in self._connections:
            silence_s = time.monotonic() - connection.heard_at
            left = self._running_on(connection)
            if left and silence_s > self._deadline_s:
                connection.kill()
                self._lose(
                    connection,
                    f"{connection.host} has been silent for {silence_s:.0f} s while rank {_join(left)} ran there: the "
                    f"machine or the network to it is gone (if it still runs, it ends its ranks by itself within "
                    f"{self._deadline_s + self._grace_s:.0f} s)",
                )

    def _lose(self, connection: Connection, text: str) -> None:
        lost = self._running_on(connection)
        self._running -= set(lost)
        if not self._has_to_end():
            others = [rank for rank in self._ranks if rank not in lost]
            self._end_for(_Cause(text, LOST_HOST_CODE), [*lost, *others])

    def _has_to_end(self) -> bool:
        return self._cause is not None or self._signal is not None

    def _interrupt(self, number: int) -> None:
        name = signal.Signals(number).name
        if self._signal is not None:
            self._log.note(f"{name} again: killing rank {_join(self._running)}")
            self._end_all(signal.SIGKILL, 0)
            return
        self._signal = number
        self._log.interrupt()
        if self._shutdown_s and 0 in self._running:
            self._log.note(f"{name}: rank 0 has {self._shutdown_s:g} s to end, then the others end")
            # It ends by itself after that, which takes a moment.
            self._end_others_at = time.monotonic() + self._shutdown_s + self._grace_s
            self._connections[self._ranks[0].host].send(Message(kind="signal", rank=0, signal=number))
            return
        self._log.note(f"{name}: ending rank {_join(self._running)}, for {self._grace_s:g} s at most")
        self._end_all(number, self._grace_s)

    def _end_all(self, number: int, grace_s: float) -> None:
        # JAX's coordination service makes ranks ignore SIGTERM: the keeper kills them after the grace period.
        for connection in self._connections:
            if not connection.is_closed:
                connection.send(Message(kind="end", signal=number, seconds=grace_s))
        self._give_up_at = min(self._give_up_at, time.monotonic() + grace_s + self._deadline_s)

    def _running_on(self, connection: Connection) -> list[int]:
        index = self._connections.index(connection)
        return sorted(rank for rank in self._running if self._ranks[rank].host == index)

    def _report(self) -> int:
        if self._cause is None:
            if self._signal is None:
                self._log.show_native(hold_s=0)
            return 0 if self._signal is None or self._has_ended_well else 128 + self._signal
        cause = self._cause
        tail = [] if cause.rank is None else self._log.tail(cause.rank)
        self._log.note(cause.text + (", its last lines:" if tail else ""))
        for line in tail:
            self._log.note(f"  | {line}")
        if self._ended_by_us:
            self._log.note(f"ended the other {self._ended_by_us} rank(s)")
        if path := self._log.keep_native():
            self._log.note(f"the native output of the others at that time is in {path}")
        if self._watch.has_called():
            self._log.note("requests that had not been answered are lost: start the command again")
        return cause.code


@contextlib.contextmanager
def catch_signals(inbox: queue.SimpleQueue[Event]) -> Iterator[None]:
    """Turns signals that would end this process into events. Does nothing outside the main thread."""
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
    """Tells the keepers that the launcher is alive, in its own thread: showing output may block indefinitely."""
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


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _join(ranks: Sequence[int] | set[int]) -> str:
    return ", ".join(str(rank) for rank in sorted(ranks)) or "none"
