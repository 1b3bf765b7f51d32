"""Runs a module as `python -m` does, in a process that does not outlive its parent and keeps its output clean.

    python -m step3_jax.launch.child PARENT_ID MODULE [WORDS ...]

The keeper ends its processes itself; the kernel does where the keeper is killed and cannot.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent(parent_id: int) -> None:
    """Has the kernel kill this process when its parent dies. Linux alone can; elsewhere nothing happens."""
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # It may have died before it was asked for.
    if os.getppid() != parent_id:
        os.kill(os.getpid(), signal.SIGKILL)


def keep_output_clean() -> None:
    """Leaves standard output to Python: what native code writes there (gloo does when it connects) goes to stderr."""
    ours = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(ours, "w", buffering=1, encoding=sys.stdout.encoding, errors=sys.stdout.errors)


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    keep_output_clean()
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
