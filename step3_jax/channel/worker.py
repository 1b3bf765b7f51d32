"""The end of the ranks above 0: receives calls one after the other."""

from __future__ import annotations

import time

import zmq

from step3_jax import __version__
from step3_jax.channel.address import ChannelAddress
from step3_jax.channel.end import End, left_ms
from step3_jax.channel.failure import RunLostError
from step3_jax.channel.message import Decoder, Encoder, Fields, Message

# Rank 0's last message may arrive shortly after the news that it is gone.
_LAST_MS = 200
# A message to a channel that is just being closed is lost: how often hello is repeated until there is an answer.
_HELLO_S = 1.0


class WorkerChannel:
    """A worker's end, for one thread."""

    def __init__(self, address: ChannelAddress, rank: int, name: str) -> None:
        """Starts to connect, and says hello as soon as rank 0 listens.

        Args:
          address: Where rank 0 listens.
          rank: This process's rank.
          name: Its name in messages.
        """
        self._end = End(zmq.DEALER, address, is_driver=False)
        self._socket = self._end.socket
        self._socket.setsockopt(zmq.IDENTITY, f"rank {rank}".encode())
        self._socket.connect(address.endpoint)
        self._decoder = Decoder()
        self._is_welcome = False
        self._name = name
        self._say_hello()

    def wait_for_driver(self, timeout_s: float) -> None:
        """Waits until rank 0 has answered.

        Raises:
          TimeoutError: If it does not in time.
          RunLostError: If it leaves.
        """
        give_up_at = time.monotonic() + timeout_s
        while not self._is_welcome:
            now = time.monotonic()
            if now >= give_up_at:
                raise TimeoutError(
                    f"rank 0 did not answer at {self._end.address} within {timeout_s:g} s: is it running, is the port open "
                    "between the hosts, and STEP3_SECRET the same in all processes?"
                )
            if self._receive(min(give_up_at, now + _HELLO_S)) is None:
                self._say_hello()

    def ready(self, *, takes_batches: bool) -> None:
        """Reports that calls can be made.

        Args:
          takes_batches: Whether to receive whole calls, or only their sizes.
        """
        self._send("ready", {"takes_batches": takes_batches})

    def answer(self, fields: Fields) -> None:
        """Answers a question."""
        self._send("answer", fields)

    def fail(self, place: str, text: str) -> None:
        """Reports why this rank cannot continue, and in which call."""
        self._send("error", {"place": place, "text": text})

    def has_message(self, timeout_s: float = 0.0) -> bool:
        """Whether the next call has arrived, or does in time."""
        return bool(self._socket.poll(round(timeout_s * 1000)))

    def receive(self) -> Message:
        """Waits for the next call, as long as rank 0 is alive.

        Raises:
          RunLostError: If rank 0 is lost.
          MessageError: If what arrived is not a message.
        """
        message = self._receive(None)
        while message is None or message.kind in ("welcome", "beat"):
            message = self._receive(None)
        return message

    def close(self) -> None:
        """Closes the channel."""
        self._end.close()

    def _receive(self, give_up_at: float | None) -> Message | None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._end.monitor, zmq.POLLIN)
        while True:
            found = dict(poller.poll(None if give_up_at is None else left_ms(give_up_at)))
            if not found:
                return None
            if self._socket not in found and self._end.has_lost_connection() and self._is_welcome:
                if not self._socket.poll(_LAST_MS):
                    raise RunLostError("rank 0 is gone: it ended without a message, or the network to it is cut")
                found[self._socket] = zmq.POLLIN
            if self._socket in found:
                frames = self._socket.recv_multipart(copy=False)
                message = self._decoder.decode([frame.buffer for frame in frames])
                self._is_welcome = True
                return message

    def _say_hello(self) -> None:
        self._send("hello", {"name": self._name, "version": __version__})

    def _send(self, kind: str, fields: Fields) -> None:
        self._socket.send_multipart(Encoder().encode(Message(kind, fields)))
