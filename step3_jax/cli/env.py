"""`step3 env`: what this machine and this installation are, for a report of a problem."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys

import jax

from step3_jax import __version__
from step3_jax.engine.compile_cache import enable_compile_cache

LIBRARIES = ("jax", "jaxlib", "flax", "numpy", "tokenizers", "safetensors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Prints the environment."""
    found = describe_environment()
    if arguments.json:
        print(json.dumps(found))
        return 0
    width = max(len(name) for name in found)
    for name, value in found.items():
        print(f"{name:<{width}}  {_format(value)}")
    return 0


def describe_environment() -> dict[str, object]:
    """Versions, devices, memory and folders, by name; memory in bytes, None where it cannot be read."""
    cache = enable_compile_cache()
    versions = {"step3-jax": __version__, "python": platform.python_version()}
    return {
        "versions": versions | {name: _version(name) for name in LIBRARIES},
        "executable": sys.executable,
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _host_memory(),
        "backend": jax.default_backend(),
        "devices": [_describe_device(device) for device in jax.devices()],
        "kernels": _kernels(),
        "compile_cache": None if cache is None else str(cache),
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _host_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf, other systems lack the names.
        return None


def _describe_device(device: jax.Device) -> dict[str, object]:
    try:
        stats = device.memory_stats() or {}
    except (NotImplementedError, jax.errors.JaxRuntimeError):  # The CPU backend counts nothing.
        stats = {}
    return {"id": device.id, "kind": device.device_kind, "memory_bytes": stats.get("bytes_limit")}


def _kernels() -> str:
    if importlib.util.find_spec("pallas_kernels") is None:
        return "pallas kernels: none yet; XLA path"
    return "pallas kernels: installed"


def _format(value: object) -> str:
    """One line for a reader."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_format(item)}" for name, item in value.items() if item is not None)
    if isinstance(value, list):
        return "; ".join(_format(item) for item in value)
    if isinstance(value, int) and value >= 2**20:
        return f"{value / 2**30:.1f} GiB"
    return "-" if value is None else str(value)
