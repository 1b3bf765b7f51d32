"""What all processes and programs on GPUs share: how programs are compiled, and how much memory JAX gets."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Protocol

# JAX's pool as a share of a device's memory; the rest is for the driver, the communication library's buffers and
# fragmentation.
MEMORY_SHARE = 0.95
# The share of that pool that weights and cache leave to calls at least, whatever the estimate of their arrays: the estimate
# ignores fragmentation, and none of it was measured.
ACTIVATION_SHARE = 0.03
# Variables for the pool's share, which JAX reads when it first looks for GPUs; the second is the old name. JAX fails if both
# are set. Its own default is 0.75.
POOL_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
# XLA assumes that a program may use 0.8 of the memory, less its arguments. Weights and cache fill more than
# that, so it believes it is short of memory and recomputes things to save some; no limit that it can be given
# helps, since what it multiplies is zero.
COMPILER_OPTIONS: Mapping[str, str] = {"xla_disable_hlo_passes": "rematerialization"}
_GPU_PLATFORMS = ("gpu", "cuda", "rocm")


class Device(Protocol):
    """The interface of a `jax.Device` that is used here, where JAX is not imported."""

    def memory_stats(self) -> Mapping[str, int] | None:
        """Bytes by name; None if the backend has no statistics."""
        ...


def compiler_options(platform: str) -> dict[str, str] | None:
    """Options for `jax.jit` of a program for a platform, named as by `jax.default_backend()` or `Device.platform`."""
    return dict(COMPILER_OPTIONS) if is_gpu(platform) else None


def is_gpu(platform: str) -> bool:
    """Whether a platform, by the same names, is a GPU."""
    return platform in _GPU_PLATFORMS


def claim_memory(environment: MutableMapping[str, str] | None = None, *, share: float = MEMORY_SHARE) -> None:
    """Makes JAX take a share of each GPU for its pool, unless the user has set the share.

    Call it before the first use of a device; later it has no effect. Only the first call counts.

    Args:
      environment: The process's environment if absent.
      share: Share of a GPU's memory.
    """
    environment = os.environ if environment is None else environment
    if not any(environment.get(name) for name in POOL_VARIABLES):
        environment[POOL_VARIABLES[0]] = str(share)


def kept_free(pool_bytes: int, workspace_bytes: int) -> int:
    """Bytes of a device's pool that weights and cache leave to calls: the estimate for the largest one, or more.

    Args:
      pool_bytes: JAX's share of the memory.
      workspace_bytes: The estimate, see `step3_jax/layout/workspace.py`.
    """
    return max(pool_bytes - int((1 - ACTIVATION_SHARE) * pool_bytes), workspace_bytes)


def memory_left(devices: Iterable[Device], workspace_bytes: int) -> int | None:
    """Bytes that weights and cache may still take on each device: the minimum; None if one does not report it.

    Args:
      devices: The devices of this process.
      workspace_bytes: Estimate of what the largest call needs besides.
    """
    left = []
    for device in devices:
        stats = device.memory_stats()
        if not stats or "bytes_limit" not in stats:
            return None
        # The limit is the pool's, to which `MEMORY_SHARE` has been applied already.
        pool_bytes = stats["bytes_limit"]
        left.append(pool_bytes - kept_free(pool_bytes, workspace_bytes) - stats["bytes_in_use"])
    return min(left)
