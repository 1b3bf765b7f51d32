"""A rank without jax that behaves like one with it: it waits for its peers in every step, and dies if it loses them.

Options name ranks, such as "1" or "0,1".
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import sys
import time
from types import FrameType

from step3_jax.beacon import Beacon

# What jaxlib 0.11.2 wrote when a peer was killed.
NOISE = """\
E1122 02:03:11.052956    5686 coordination_service_agent.cc:288] Polled an error from coordination service.
F1122 02:03:11.053001    5686 client.h:86] Terminating process because the JAX distributed service detected fatal errors.
:UNAVAILABLE:Stream removed (Socket closed)
=== Source Location Trace: ===
external/xla+/xla/pjrt/distributed/coordination/coordination_service_error_util.cc:64

*** Check failure stack trace: ***
    @     0x7f210d93d7d4  absl::lts_20260526::log_internal::LogMessage::SendToLog()
"""


def connect(rank: int, num_processes: int) -> list[socket.socket]:
    host, _, port = os.environ["STEP3_COORDINATOR"].rpartition(":")
    if rank == 0:
        with socket.create_server((host, int(port))) as server:
            return [server.accept()[0] for _ in range(1, num_processes)]
    while True:
        with contextlib.suppress(OSError):
            return [socket.create_connection((host, int(port)))]
        time.sleep(0.05)


def exchange(peers: list[socket.socket]) -> None:
    for peer in peers:
        peer.sendall(b"x")
    for peer in peers:
        if not peer.recv(1):
            raise ConnectionResetError


def drain(number: int, frame: FrameType | None) -> None:
    time.sleep(0.5)
    print("drained", file=sys.stderr, flush=True)
    sys.exit(0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--afd")
    parser.add_argument("--shutdown-timeout")
    parser.add_argument("words", nargs="*")
    parser.add_argument("--drain", default="", help="end with code 0 a moment after SIGTERM")
    parser.add_argument("--deaf", default="", help="ignore SIGTERM")
    parser.add_argument("--end-with-peer", default="", help="end with code 0 when a peer is gone")
    parser.add_argument("--wait", default="", help="for ever before connecting")
    parser.add_argument("--steps", type=int, default=10**9)
    parser.add_argument("--leave", default="", help="with code 0 at step 200")
    parser.add_argument("--die", default="", help="at step 200: the peers notice, and a moment later this ends too")
    parser.add_argument("--mistake", default="", help="end with code 2 and a line that says why, at once")
    parser.add_argument("--lose-quietly", default="", help="keep waiting for a lost peer")
    parser.add_argument("--abort", default="", help="die of a lost peer as native code does, and not as Python does")
    options = parser.parse_args()
    rank = os.environ["STEP3_PROCESS_ID"]
    is_named = {name: rank in value.split(",") for name, value in vars(options).items() if isinstance(value, str)}

    beacon = Beacon.from_environment()
    if is_named["drain"]:
        signal.signal(signal.SIGTERM, drain)
    if is_named["deaf"]:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print(f"answer of rank {rank}", flush=True)
    print(f"note of rank {rank}", file=sys.stderr, flush=True)
    if is_named["mistake"]:
        print("step3: error: no such model", file=sys.stderr)
        sys.exit(2)
    while is_named["wait"]:
        time.sleep(1)
    peers = connect(int(rank), int(os.environ["STEP3_NUM_PROCESSES"]))
    for number in range(options.steps):
        if is_named["leave"] and number == 200:
            return
        if is_named["die"] and number == 200:
            for peer in peers:
                peer.close()
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGKILL)
        call = beacon.enter("decode")
        try:
            exchange(peers)
        except OSError:
            while is_named["lose_quietly"]:
                time.sleep(1)
            if is_named["end_with_peer"]:
                sys.exit(0)
            if is_named["abort"]:
                os.write(2, NOISE.encode())
                signal.signal(signal.SIGABRT, signal.SIG_DFL)
                os.abort()
            words = (
                "[external/gloo/gloo/transport/tcp/pair.cc:538] Read error [127.0.0.1]:5864: Connection reset by peer"
            )
            print(f"step3: error: ValueError: UNKNOWN: Gloo all-reduce failed: {words}", file=sys.stderr)
            sys.exit(2)
        beacon.leave(call)
        time.sleep(0.005)
    exchange(peers)


if __name__ == "__main__":
    main()
