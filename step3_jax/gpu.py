"""What every process and every program on GPUs has in common: how programs are compiled, and how much memory is JAX's."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Protocol

# Of a device's memory, JAX's pool; the rest is for the driver, the communication library's buffers and fragmentation.
MEMORY_SHARE = 0.95
# Of that pool, what weights and cache leave to calls at least, whatever the estimate of their arrays is: it knows nothing of
# fragmentation, and nothing of it was measured.
ACTIVATION_SHARE = 0.03
# What sets the pool's share, as JAX reads it when it first looks for GPUs; the second is its old name. Both at once are an
# error of JAX's. Its own default is 0.75.
POOL_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
# XLA takes 0.8 of the memory, less a program's arguments, for all that the program may use. Weights and cache fill more than
# that, so it believes itself short of memory and computes things over and over to save some; no limit that it can be given
# helps, since what it multiplies is zero.
COMPILER_OPTIONS: Mapping[str, str] = {"xla_disable_hlo_passes": "rematerialization"}
_GPU_PLATFORMS = ("gpu", "cuda", "rocm")


class Device(Protocol):
    """What is asked of a `jax.Device` here, where JAX is not imported."""

    def memory_stats(self) -> Mapping[str, int] | None:
        """Bytes by name; None where the backend counts none."""
        ...


def compiler_options(platform: str) -> dict[str, str] | None:
    """Options for `jax.jit` of a program for a platform, as `jax.default_backend()` or `Device.platform` name it."""
    return dict(COMPILER_OPTIONS) if is_gpu(platform) else None


def is_gpu(platform: str) -> bool:
    """Whether a platform, by the same names, is one of GPUs."""
    return platform in _GPU_PLATFORMS


def claim_memory(environment: MutableMapping[str, str] | None = None, *, share: float = MEMORY_SHARE) -> None:
    """Has JAX take a share of each GPU for its pool, unless the user has set the share.

    Call it before the first device is used; later it changes nothing. The first call counts.

    Args:
      environment: Of the process if absent.
      share: Of a GPU's memory.
    """
    environment = os.environ if environment is None else environment
    if not any(environment.get(name) for name in POOL_VARIABLES):
        environment[POOL_VARIABLES[0]] = str(share)


def kept_free(pool_bytes: int, workspace_bytes: int) -> int:
    """Bytes of a device's pool that weights and cache leave to calls: what the largest is estimated to need, or more.

    Args:
      pool_bytes: JAX's share of the memory.
      workspace_bytes: The estimate, see `step3_jax/layout/workspace.py`.
    """
    return max(pool_bytes - int((1 - ACTIVATION_SHARE) * pool_bytes), workspace_bytes)


def memory_left(devices: Iterable[Device], workspace_bytes: int) -> int | None:
    """Bytes that weights and cache may still take on each device: the least of all; None where one does not say.

    Args:
      devices: Those of this process.
      workspace_bytes: What the largest call is estimated to need beside them.
    """
    left = []
    for device in devices:
        stats = device.memory_stats()
        if not stats or "bytes_limit" not in stats:
            return None
        # The limit is the pool's, of which `MEMORY_SHARE` has been taken already.
        pool_bytes = stats["bytes_limit"]
        left.append(pool_bytes - kept_free(pool_bytes, workspace_bytes) - stats["bytes_in_use"])
    return min(left)
