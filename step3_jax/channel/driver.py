"""Rank 0's end: sends each call to all workers, and notices when one of them fails or is lost."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence

import zmq

from step3_jax import __version__
from step3_jax.channel.address import ChannelAddress
from step3_jax.channel.end import End, left_ms
from step3_jax.channel.failure import RunLostError
from step3_jax.channel.message import Decoder, Encoder, Fields, Message, MessageError

# A rank that fails may only be the first to lose another one: wait this long for a lost connection.
_DOUBT_S = 1.0
# The end of a connection is known slightly before the socket knows whose it was.
_PROBES, _PROBE_S = 20, 0.01
# The port of a previous channel may need a moment to become free.
_BIND_S = 5.0
_MAX_ANSWER_BYTES = 2**20


@dataclasses.dataclass
class _Worker:
    """A worker that has connected.

    Attributes:
      name: Its name in messages.
      takes_batches: Whether it gets whole calls, or only their sizes.
      is_ready: Whether it has loaded its weights.
    """

    name: str
    takes_batches: bool = True
    is_ready: bool = False


class DriverChannel:
    """Rank 0's end. Any thread may use it, one at a time.

    Its own thread listens to the workers, so that a lost rank is noticed even while waiting for the device.
    """

    def __init__(self, address: ChannelAddress, num_workers: int) -> None:
        """Starts to listen.

        Args:
          address: Where to listen.
          num_workers: How many will connect: the ranks from 1.

        Raises:
          ValueError: If the address cannot be bound.
        """
        self._end = End(zmq.ROUTER, address, is_driver=True)
        self._socket = self._end.socket
        # Sending to a lost worker is an error.
        self._socket.router_mandatory = True
        self._socket.maxmsgsize = _MAX_ANSWER_BYTES
        _bind(self._end)
        self._num_workers = num_workers
        self._workers: dict[int, _Worker] = {}
        self._answers: dict[int, Fields] = {}
        self._encoder, self._sizes_encoder = Encoder(), Encoder()
        self._failure: RunLostError | None = None
        self._suspect: tuple[float, str] | None = None
        self._on_failure: Callable[[RunLostError], None] = lambda failure: None
        # Guards the socket and all of the above; notified of every change.
        self._news = threading.Condition(threading.RLock())
        self._is_closed = False
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._listen, name="step3-channel", daemon=True)
        self._thread.start()
        # The workers should leave in order even if a program just ends.
        atexit.register(self.close)

    def on_failure(self, call: Callable[[RunLostError], None]) -> None:
        """Sets a callback, from any thread, for when the run is lost; called immediately if it already is."""
        with self._news:
            self._on_failure = call
            if self._failure is not None:
                call(self._failure)

    def check(self) -> None:
        """Raises RunLostError if the run is lost."""
        with self._news:
            if self._failure is not None:
                raise self._failure

    def wait_for_workers(self, timeout_s: float) -> None:
        """Waits until all workers have connected.

        Raises:
          TimeoutError: If some do not in time; the message names them.
          RunLostError: If one of them fails.
        """
        if self._wait(lambda: len(self._workers) == self._num_workers, timeout_s):
            return
        missing = [str(rank) for rank in range(1, self._num_workers + 1) if rank not in self._workers]
        raise TimeoutError(
            f"rank {', '.join(missing)} did not come to rank 0 at {self._end.address} within {timeout_s:g} s: see what it "
            "wrote; is the port open between the hosts, and STEP3_SECRET the same in all processes?"
        )

    def wait_until_ready(self) -> None:
        """Waits until all workers have loaded their weights, however long that takes: lost workers are noticed.

        Raises:
          RunLostError: If one of them fails.
        """
        self._wait(lambda: all(worker.is_ready for worker in self._workers.values()), None)

    def send(self, message: Message, sizes: Message | None) -> None:
        """Sends a call to all workers.

        Args:
          message: The whole call. Its arrays must not change afterwards.
          sizes: The same for workers that take no batches; None if it is not for them.

        Raises:
          RunLostError: If the run is lost.
        """
        with self._news:
            self.check()
            frames = [zmq.Frame(frame, copy=None) for frame in self._encoder.encode(message)]
            small = [] if sizes is None else self._sizes_encoder.encode(sizes)
            for rank, worker in self._workers.items():
                if worker.takes_batches:
                    self._send(rank, frames)
                elif small:
                    self._send(rank, small)
            # Sending may have consumed the signal of a message that arrived, so that no thread would wake.
            self._drain()

    def ask(self, message: Message, timeout_s: float) -> list[Fields]:
        """Sends a question to all workers, and waits for their answers, in any order.

        Raises:
          TimeoutError: If one does not answer in time; the message names it.
          RunLostError: If the run is lost.
        """
        with self._news:
            self._answers.clear()
            self.send(message, message)
            if not self._wait(lambda: len(self._answers) == self._num_workers, timeout_s):
                [late, *_] = [worker.name for rank, worker in self._workers.items() if rank not in self._answers]
                raise TimeoutError(f"{late} did not answer within {timeout_s:g} s, in {message.kind}")
            return list(self._answers.values())

    def suspect(self, text: str) -> None:
        """Reports a failure here: the run is lost, because of this unless another rank failed first."""
        with self._news:
            if not self._is_closed and self._suspect is None:
                self._suspect = time.monotonic() + _DOUBT_S, text
                # Makes the thread check the clock.
                self._wake.send(b"x")

    def close(self) -> None:
        """Tells the workers that the run has ended, and closes the channel; does nothing the second time."""
        with self._news:
            if self._is_closed:
                return
            self._is_closed = True
            atexit.unregister(self.close)
            if self._failure is None:
                for rank in self._workers:
                    with contextlib.suppress(zmq.ZMQError):
                        self._socket.send_multipart([_identity(rank), *Encoder().encode(Message("goodbye", {}))])
        self._wake.send(b"x")
        self._thread.join()
        self._end.close()
        self._wake.close()
        self._woken.close()

    def _wait(self, is_done: Callable[[], bool], timeout_s: float | None) -> bool:
        with self._news:
            found = self._news.wait_for(lambda: self._failure is not None or is_done(), timeout_s)
            self.check()
            return found

    def _send(self, rank: int, frames: Sequence[bytes | memoryview | zmq.Frame]) -> None:
        try:
            self._socket.send_multipart([_identity(rank), *frames], copy=False)
        except zmq.ZMQError:
            self._lose(rank)
            self.check()

    def _listen(self) -> None:
        """The thread's loop: waits for the socket's signal, as only one thread at a time may touch the socket itself."""
        monitor, waker = self._end.monitor, self._woken.fileno()
        poller = zmq.Poller()
        for one in (self._socket.getsockopt(zmq.FD), monitor, waker):
            poller.register(one, zmq.POLLIN)
        while True:
            with self._news:
                wait_ms = None if self._suspect is None else left_ms(self._suspect[0])
            found = dict(poller.poll(wait_ms))
            if waker in found and select.select([waker], [], [], 0)[0]:
                self._woken.recv(64)
            with self._news:
                if self._is_closed:
                    return
                self._drain()
            if monitor in found and self._end.has_lost_connection():
                self._find_lost()
            with self._news:
                if self._suspect is not None and time.monotonic() >= self._suspect[0]:
                    self._fail(self._suspect[1])

    def _drain(self) -> None:
        """Takes all messages that have arrived; it must take all, or the socket's signal is not raised again."""
        while True:
            try:
                identity, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            # Ignore messages from strangers; one that has left again needs no answer.
            with contextlib.suppress(MessageError, ValueError, KeyError, zmq.ZMQError):
                self._take(identity, Decoder().decode(frames))

    def _take(self, identity: bytes, message: Message) -> None:
        rank, fields = int(identity.removeprefix(b"rank ")), message.fields
        if message.kind == "hello" and 0 < rank <= self._num_workers:
            # It repeats its hello until it gets an answer.
            worker = self._workers.setdefault(rank, _Worker(str(fields["name"])))
            if fields["version"] != __version__:
                self._fail(f"{worker.name} has step3-jax {fields['version']}, but rank 0 has {__version__}")
            self._socket.send_multipart([identity, *Encoder().encode(Message("welcome", {}))])
        elif message.kind == "ready":
            worker = self._workers[rank]
            worker.takes_batches, worker.is_ready = bool(fields["takes_batches"]), True
        elif message.kind == "answer":
            self._answers[rank] = fields
        elif message.kind == "error":
            self.suspect(f"{self._workers[rank].name} failed in {fields['place']}: {fields['text']}")
        self._news.notify_all()

    def _find_lost(self) -> None:
        """Finds the workers whose connection has ended: nothing can be sent to them. Ignores strangers."""
        for _ in range(_PROBES):
            with self._news:
                for rank in self._workers:
                    try:
                        self._socket.send_multipart([_identity(rank), *Encoder().encode(Message("beat", {}))])
                    except zmq.ZMQError:
                        self._lose(rank)
                        return
                self._drain()
            time.sleep(_PROBE_S)

    def _lose(self, rank: int) -> None:
        """Handles a lost worker. One that reported a failure has left because of it."""
        self._drain()
        said, name = "" if self._suspect is None else self._suspect[1], self._workers[rank].name
        self._fail(said if said.startswith(name) else f"{name} is gone")

    def _fail(self, text: str) -> None:
        if self._failure is None:
            self._failure = RunLostError(text)
            self._suspect = None
            self._on_failure(self._failure)
            self._news.notify_all()


def _identity(rank: int) -> bytes:
    return f"rank {rank}".encode()


def _bind(end: End) -> None:
    problem = ""
    give_up_at = time.monotonic() + _BIND_S
    while True:
        for endpoint in end.address.listening():
            try:
                end.socket.bind(endpoint)
            except zmq.ZMQError as error:
                problem, is_taken = error.strerror or str(error), error.errno == zmq.EADDRINUSE
                if is_taken:
                    break
            else:
                return
        if time.monotonic() > give_up_at:
            end.close()
            raise ValueError(
                f"port {end.address.port}, at which rank 0 listens for the other ranks, cannot be opened ({problem}): name "
                "another with STEP3_CHANNEL=host:port in all processes, or --port of step3 launch"
            )
        time.sleep(0.1)
