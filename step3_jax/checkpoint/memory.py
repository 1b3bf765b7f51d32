"""Memory: what this process uses, and what it can still allocate."""

from __future__ import annotations

import pathlib
import resource

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
# A cgroup v1 limit above this means "none".
_NO_LIMIT = 2**60


def anonymous_bytes() -> int:
    """Anonymous memory of this process; a guess where the system does not report it."""
    found = _read_table(pathlib.Path("/proc/self/status")).get("RssAnon")
    return 2**29 if found is None else found


def available_bytes(root: pathlib.Path = pathlib.Path("/")) -> int | None:
    """Bytes that this process can still allocate before the system kills it; None where the system does not report it.

    The least of what the machine has left, what its control groups allow, and what `ulimit` allows. Cached files count as
    free, and so does swap.

    Args:
      root: Where `proc` and `sys` are.
    """
    machine = _read_table(root / "proc/meminfo")
    if "MemAvailable" not in machine:
        return None
    swap = machine.get("SwapFree", 0)
    limits = [machine["MemAvailable"] + swap, *(left + swap for left in _group_bytes(root))]
    process = _read_table(root / "proc/self/status")
    for kind, taken in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY and taken in process:
            limits.append(limit - process[taken])
    return max(min(limits), 0)


def format_bytes(num_bytes: int) -> str:
    """A size in decimal units: "641.9 GB"."""
    power = min((len(str(num_bytes)) - 1) // 3, len(_UNITS) - 1)
    return f"{num_bytes / 1000**power:.1f} {_UNITS[power]}" if power else f"{num_bytes} B"


def _group_bytes(root: pathlib.Path) -> list[int]:
    """What each control group of this process has left, for cgroup v2 and v1."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        base = root / "sys/fs/cgroup"
        names = ("memory.max", "memory.current", ("active_file", "inactive_file"))
        if "memory" in controllers.split(","):
            base /= "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file"))
        elif controllers:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        # In a container the group may be mounted as the root, while the path is the host's.
        for depth in range(len(parts) + 1):
            left = _group_left(base.joinpath(*parts[:depth]), *names)
            if left is not None:
                found.append(left)
    return found


def _group_left(folder: pathlib.Path, limit: str, usage: str, cached: tuple[str, ...]) -> int | None:
    try:
        most = (folder / limit).read_text(encoding="utf-8").strip()
        if most == "max" or int(most) >= _NO_LIMIT:
            return None
        taken = int((folder / usage).read_text(encoding="utf-8"))
        rows = (row.split() for row in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
        given_back = sum(int(row[1]) for row in rows if len(row) == 2 and row[0] in cached)
    except (OSError, ValueError):
        return None
    return int(most) - max(taken - given_back, 0)


def _read_table(path: pathlib.Path) -> dict[str, int]:
    """A system table of lines like "MemFree:  123 kB", in bytes; empty if it does not exist."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    rows = (line.split() for line in lines)
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if len(row) == 3 and row[2] == "kB"}
