"""Runs a module as `python -m` does, in a process that beats, does not outlive its parent and keeps its output apart.

    python -m step3_jax.launch.child PARENT_ID NATIVE MODULE [WORDS ...]

NATIVE is a descriptor that takes what native code writes. The keeper ends its processes itself; the kernel does where the
keeper is killed and cannot.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
from typing import TextIO

from step3_jax.beacon import Beacon

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent(parent_id: int) -> None:
    """Has the kernel kill this process when its parent dies. Linux alone can; elsewhere nothing happens."""
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # It may have died before it was asked for.
    if os.getppid() != parent_id:
        os.kill(os.getpid(), signal.SIGKILL)


def keep_output_apart(native: int) -> None:
    """Leaves standard output and error to Python: what native code writes there (gloo does when it connects) goes to
    `native`."""
    sys.stdout, sys.stderr = (_move(number, stream) for number, stream in ((1, sys.stdout), (2, sys.stderr)))
    os.dup2(native, 1)
    os.dup2(native, 2)
    os.close(native)


def _move(number: int, stream: TextIO) -> TextIO:
    """A stream of Python's to where the descriptor leads now."""
    return os.fdopen(os.dup(number), "w", buffering=1, encoding=stream.encoding, errors=stream.errors)


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    keep_output_apart(int(sys.argv[2]))
    # From here on it beats, whatever the module is.
    Beacon.from_environment()
    sys.argv = sys.argv[3:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
