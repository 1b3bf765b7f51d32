"""The machine of a measurement, and how busy it was."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import platform

from step3_jax import __version__
from step3_jax.cpu_count import count_cpus


def conditions(device: str | None = None) -> dict[str, object]:
    """Versions and the machine, as JSON values. Touches no device: another process may have them all.

    Args:
      device: Kind of the measured device; None if it does not belong to this process.
    """
    found: dict[str, object] = {
        "step3-jax": __version__,
        "jax": importlib.metadata.version("jax"),
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "threads": count_cpus(),
    }
    return found if device is None else found | {"device": device}


def cpu_pressure() -> float | None:
    """Percent of the last 10 seconds in which something waited for a CPU; None if the system does not say."""
    text = _read("/proc/pressure/cpu")
    return float(text.split("avg10=")[1].split()[0]) if "avg10=" in text else None


def load_average() -> float | None:
    """Processes that ran or waited for a CPU, averaged over the last minute; None if the system does not say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def cpu_name() -> str:
    """The processor's name."""
    names = [line.split(":", 1)[1].strip() for line in _read("/proc/cpuinfo").splitlines() if "model name" in line]
    return names[0] if names else platform.processor()


def anonymous_bytes(pid: int | None = None) -> int | None:
    """Anonymous memory of a process (None: of this one), swapped out or not.

    None if the system does not say.
    """
    status = _read(f"/proc/{'self' if pid is None else pid}/status")
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    if "RssAnon" not in fields:
        return None
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "VmSwap") if name in fields)


def _read(path: str) -> str:
    """A system file; "" if it does not exist."""
    try:
        return pathlib.Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
