"""How many CPUs this process may keep busy: what its affinity and the quotas of its control groups leave.

XLA follows the affinity alone. In a container with a quota it would start a thread for each core of the machine, and the
system would stop all of them for a part of each period.
"""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Iterator, MutableMapping

# XLA's own: the threads of its pool, which are the CPU kernels' too. It reads the second where the first is not set.
THREAD_VARIABLES = ("PJRT_NPROC", "NPROC")


def count_cpus(root: pathlib.Path = pathlib.Path("/")) -> int:
    """CPUs that this process may use, at least 1.

    Args:
      root: Where `proc` and `sys` are.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *(math.ceil(quota) for quota in _quotas(root))]))


def limit_threads(environment: MutableMapping[str, str] | None = None, root: pathlib.Path = pathlib.Path("/")) -> None:
    """Makes XLA start no more threads than `count_cpus`, unless the user has set their number.

    Call it before the first use of a device; later it has no effect.

    Args:
      environment: The process's environment if absent.
      root: Where `proc` and `sys` are.
    """
    environment = os.environ if environment is None else environment
    if not any(environment.get(name) for name in THREAD_VARIABLES) and any(True for _ in _quotas(root)):
        environment[THREAD_VARIABLES[0]] = str(count_cpus(root))


def _quotas(root: pathlib.Path) -> Iterator[float]:
    """CPUs that each control group of this process may use on average, where there is a limit; cgroup v2 and v1."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        base = root / "sys/fs/cgroup"
        names: tuple[str, ...] = ("cpu.max",)
        if "cpu" in controllers.split(","):
            base, names = base / "cpu", ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        elif controllers:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        # In a container the group may be mounted as the root, while the path is the host's.
        for depth in range(len(parts) + 1):
            folder = base.joinpath(*parts[:depth])
            try:
                words = " ".join((folder / name).read_text(encoding="utf-8") for name in names).split()
                quota, period = (float(word) for word in words)
            except (OSError, ValueError):
                # No such group here, or "max".
                continue
            if quota > 0 and period > 0:
                yield quota / period
