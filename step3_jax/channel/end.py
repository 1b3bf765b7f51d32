"""What both ends of the channel have in common: the socket's options, and hearing that a connection has ended."""

from __future__ import annotations

import contextlib
import time

import zmq
from zmq.utils.monitor import recv_monitor_message

from step3_jax.channel.address import ChannelAddress
from step3_jax.channel.key import derive_keys

# ZeroMQ's own thread asks the other end so often whether it is there, and gives the connection up after so long: a host
# that is off, a network that is cut, a process that is stopped. It answers while Python computes. Together less than
# `distributed.HEARTBEAT_TIMEOUT_S`, after which JAX ends rank 0 before its clients have been told.
_ASK_MS, _LOST_MS = 5_000, 20_000
# Time for the last messages to leave when an end is closed.
_LINGER_MS = 2_000
# Longest wait for a message to be taken by the operating system.
_SEND_MS = 60_000


class End:
    """A socket and what tells of its connections."""

    def __init__(self, kind: int, address: ChannelAddress, *, is_driver: bool) -> None:
        """Opens neither: see `driver` and `worker`."""
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
        """Whether a connection has ended since this was asked last."""
        has_lost = False
        while self.monitor.poll(0):
            recv_monitor_message(self.monitor)
            has_lost = True
        return has_lost

    def close(self) -> None:
        """Lets the last messages leave, for a bounded time."""
        with contextlib.suppress(zmq.ZMQError):
            self.socket.disable_monitor()
        self.monitor.close(linger=0)
        self.socket.close()
        # Waits for the socket's last messages, at most as long as it lingers.
        self._context.term()


def left_ms(give_up_at: float) -> int:
    """Milliseconds until a time on `time.monotonic`, for a poll."""
    return max(0, round((give_up_at - time.monotonic()) * 1000))
