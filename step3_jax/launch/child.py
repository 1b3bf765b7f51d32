"""Runs a module like `python -m`, in a process that beats, does not outlive its parent and separates native output.

    python -m step3_jax.launch.child PARENT_ID NATIVE MODULE [WORDS ...]

NATIVE is a descriptor that receives the output of native code. The keeper ends its processes itself; the kernel does if
the keeper is killed and cannot.
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
    """Has the kernel kill this process when its parent dies. Works only on Linux; does nothing elsewhere."""
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # The parent may have died before this was set.
    if os.getppid() != parent_id:
        os.kill(os.getpid(), signal.SIGKILL)


def keep_output_apart(native: int) -> None:
    """Reserves standard output and error for Python: what native code writes there (gloo does when it connects) goes to
    `native`."""
    sys.stdout, sys.stderr = (_move(number, stream) for number, stream in ((1, sys.stdout), (2, sys.stderr)))
    os.dup2(native, 1)
    os.dup2(native, 2)
    os.close(native)


def _move(number: int, stream: TextIO) -> TextIO:
    """A Python stream to the descriptor's current target."""
    return os.fdopen(os.dup(number), "w", buffering=1, encoding=stream.encoding, errors=stream.errors)


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    keep_output_apart(int(sys.argv[2]))
    # It beats from here on, whatever the module is.
    Beacon.from_environment()
    sys.argv = sys.argv[3:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
