"""A rank that does what its words say: RANK:ACTION or *:ACTION, one after another."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

_RANK = os.environ["STEP3_PROCESS_ID"]


def _act(action: str) -> None:
    name, _, value = action.partition("=")
    if name == "say":
        print(value, flush=True)
    elif name == "warn":
        print(value, file=sys.stderr, flush=True)
    elif name == "pid":
        print(f"pid {os.getpid()}", file=sys.stderr, flush=True)
    elif name == "show":
        print(f"{value}={os.environ.get(value, '')}", file=sys.stderr, flush=True)
    elif name == "bytes":
        sys.stdout.buffer.write(bytes(range(256)) * int(value))
    elif name == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    elif name == "child":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
        print(f"pid {child.pid}", file=sys.stderr, flush=True)
    elif name == "wait":
        while not os.path.exists(value):  # noqa: PTH110 - a rank imports as little as it can
            time.sleep(0.05)
    elif name == "sleep":
        time.sleep(float(value))
    elif name == "kill":
        os.kill(os.getpid(), int(value))
    elif name == "exit":
        sys.exit(int(value))
    else:
        raise ValueError(action)


for word in sys.argv[1:]:
    rank, _, what = word.partition(":")
    if rank in ("*", _RANK):
        _act(what)
