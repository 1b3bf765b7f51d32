"""`step3 env`: describes this machine and this installation, for a problem report."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import subprocess
import sys

import jax

import step3_jax
from step3_jax import __version__, resources
from step3_jax.cli.choice import DEFAULT_MODEL
from step3_jax.cli.variables import VARIABLES, read_variables
from step3_jax.cpu_count import count_cpus
from step3_jax.cpu_kernels.loader import describe_kernels
from step3_jax.engine.compile_cache import enable_compile_cache
from step3_jax.mesh import find_devices

LIBRARIES = ("jax", "jaxlib", "flax", "numpy", "ml-dtypes", "orbax-checkpoint", "tensorstore", "tokenizers", "pyzmq")
# Packages of extras: listed if they are installed.
OPTIONAL = ("jax-cuda12-plugin", "jax-cuda13-plugin", "fastapi", "uvicorn", "pydantic", "llguidance", "matplotlib")


def run(arguments: argparse.Namespace) -> int:
    """Prints the environment; returns 1 if the devices that JAX_PLATFORMS names are not there."""
    found = describe_environment()
    code = 1 if found["backend"] is None else 0
    if arguments.json:
        print(json.dumps(found))
        return code
    variables = read_variables(os.environ)
    width = max(len(name) for name in (*found, *variables))
    for name, value in found.items():
        if name != "variables":
            print(f"{name:<{width}}  {_format(value)}")
    print("\nvariables")
    for name, setting in variables.items():
        print(f"{name:<{width}}  {'-' if setting is None else setting}  ({VARIABLES[name]})")
    return code


def describe_environment() -> dict[str, object]:
    """Versions, devices, memory, folders and variables, by name; memory in bytes, None where it cannot be read.

    Without the devices that JAX_PLATFORMS names, `backend` is None and `problem` says what to do.
    """
    devices: list[dict[str, object]] = []
    problem, backend = None, None
    try:
        devices = [_describe_device(device) for device in find_devices()]
        backend = jax.default_backend()
    except ValueError as error:
        problem = str(error)
    versions = {"step3-jax": __version__, "python": platform.python_version()}
    found: dict[str, object] = {
        "versions": versions | _find_versions(),
        "package": str(pathlib.Path(step3_jax.__file__).parent),
        "commit": _find_commit(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "processor": _find_processor(),
        "cpus": count_cpus(),
        "memory_bytes": _host_memory(),
        "backend": backend,
        "devices": devices,
        "kernels": _kernels(),
        "cpu_kernels": describe_kernels(),
        "compile_cache": enable_compile_cache(),
        "model": _find_shipped_model(),
        "variables": read_variables(os.environ),
    }
    return found if problem is None else found | {"problem": problem}


def _find_versions() -> dict[str, str]:
    found = {name: _version(name) for name in (*LIBRARIES, *OPTIONAL)}
    return {name: version or "not installed" for name, version in found.items() if version or name in LIBRARIES}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _find_commit() -> str | None:
    """The commit of a checkout, and whether files have changed since; None outside a checkout."""
    folder = pathlib.Path(step3_jax.__file__).parents[1]
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _find_processor() -> str | None:
    """The processor's name; None if /proc does not say."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")), None)


def _host_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf, other systems lack the names.
        return None


def _describe_device(device: jax.Device) -> dict[str, object]:
    try:
        stats = device.memory_stats() or {}
    except (NotImplementedError, jax.errors.JaxRuntimeError):  # The CPU backend has no memory statistics.
        stats = {}
    return {"id": device.id, "kind": device.device_kind, "memory_bytes": stats.get("bytes_limit")}


def _kernels() -> str:
    if importlib.util.find_spec("pallas_kernels") is None:
        return "pallas kernels: not installed; XLA alone"
    return "pallas kernels: installed (for GPUs of compute capability 9.0; only XLA elsewhere)"


def _find_shipped_model() -> str | None:
    """Folder of the tiny model, the commands' default."""
    try:
        return str(resources.find(DEFAULT_MODEL))
    except ValueError:
        return None


def _format(value: object) -> str:
    """One line for a reader."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_format(item)}" for name, item in value.items() if item is not None)
    if isinstance(value, list):
        return "; ".join(_format(item) for item in value)
    if isinstance(value, int) and value >= 2**20:
        return f"{value / 2**30:.1f} GiB"
    return "-" if value is None else str(value)
