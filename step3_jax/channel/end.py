"""What both ends of the channel share: the socket's options, and noticing that a connection has ended."""

from __future__ import annotations

import contextlib
import time

import zmq
from zmq.utils.monitor import recv_monitor_message

from step3_jax.channel.address import ChannelAddress
from step3_jax.channel.key import derive_keys

# How often ZeroMQ's own thread pings the other end, and after how long it gives the connection up: a host
# that is off, a network that is cut, a process that is stopped. It answers while Python computes. Together less than
# `distributed.HEARTBEAT_TIMEOUT_S`, after which JAX ends rank 0 before its clients have been told.
_ASK_MS, _LOST_MS = 5_000, 20_000
# Time to send the last messages when an end is closed.
_LINGER_MS = 2_000
# Longest wait for the operating system to take a message.
_SEND_MS = 60_000


class End:
    """A socket and the monitor of its connections."""

    def __init__(self, kind: int, address: ChannelAddress, *, is_driver: bool) -> None:
        """Does not open them: see `driver` and `worker`."""
        self.address = address
        self._context = zmq.Context()
        self.socket = self._context.socket(kind)
        self.socket.linger = _LINGER_MS
        self.socket.sndtimeo = _SEND_MS
        self.socket.heartbeat_ivl = _ASK_MS
        self.socket.heartbeat_timeout = self.socket.heartbeat_ttl = _LOST_MS
        self.socket.ipv6 = ":" in address.host
        if address.secret is not None:
            keys = derive_keys(address.secret, is_driver=is_driver)
            self.socket.curve_publickey, self.socket.curve_secretkey = keys.public, keys.secret
            if is_driver:
                self.socket.curve_server = True
            else:
                self.socket.curve_serverkey = keys.peer
        self.monitor = self.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)

    def has_lost_connection(self) -> bool:
        """Whether a connection has ended since the last call."""
        has_lost = False
        while self.monitor.poll(0):
            recv_monitor_message(self.monitor)
            has_lost = True
        return has_lost

    def close(self) -> None:
        """Sends the last messages, for a bounded time."""
        with contextlib.suppress(zmq.ZMQError):
            self.socket.disable_monitor()
        self.monitor.close(linger=0)
        self.socket.close()
        # Waits for the socket's last messages, at most for its linger time.
        self._context.term()


def left_ms(give_up_at: float) -> int:
    """Milliseconds until a time on `time.monotonic`, for a poll."""
    return max(0, round((give_up_at - time.monotonic()) * 1000))
