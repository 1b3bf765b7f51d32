"""Devices: the available ones, the mesh of a parallel setting, and the meaning of its axes."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from step3_jax.cpu_count import limit_threads
from step3_jax.distributed import read_number, set_cpu_devices, too_few_cpu_devices
from step3_jax.layout.parallel import AttentionForm, Parallel
from step3_jax.layout.table import AXES, mesh_axes
from step3_jax.rank import COORDINATOR, CPU_DEVICES
from step3_jax.sharding import parameter_spec

_GPU_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
# XLA's own flag; JAX refuses it together with its own setting.
_XLA_CPU_DEVICES = "xla_force_host_platform_device_count"


@dataclasses.dataclass(frozen=True)
class Layout:
    """A parallel setting on its devices.

    Attributes:
      mesh: The devices, along `layout.table.AXES`.
      parallel: The complete setting: ep is a number, and the exchange is chosen.
    """

    mesh: Mesh
    parallel: Parallel

    @property
    def attention(self) -> AttentionForm:
        return self.parallel.attention

    def axes(self, logical: str) -> tuple[str, ...]:
        """The mesh axes of a logical axis that have more than one device."""
        axes = mesh_axes(logical, self.attention, self.parallel.vision)
        return tuple(axis for axis in axes if self.mesh.shape[axis] > 1)

    def size(self, logical: str) -> int:
        """Parts that a logical axis is cut into."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes(logical))

    def spec(self, *logical: str | None) -> PartitionSpec:
        """The spec of an array whose first axes have these logical names."""
        return PartitionSpec(*(self.axes(name) or None if name is not None else None for name in logical))

    def sharding(self, *logical: str | None) -> NamedSharding:
        """Like `spec`; without names every device has a copy."""
        return NamedSharding(self.mesh, self.spec(*logical))

    def parameter(self, path: Sequence[str | int]) -> NamedSharding:
        """The sharding of the parameter at `path` of a `Step3`, in the shape of `sharding.view_shape`."""
        return NamedSharding(self.mesh, parameter_spec(path, self.attention, self.parallel.vision))


def padded_shape(shape: tuple[int, ...], sharding: NamedSharding) -> tuple[int, ...]:
    """The shape of an array whose axes are padded with zeros to a multiple of their devices."""
    entries = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
    named = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in entries]
    parts = [math.prod(sharding.mesh.shape[axis] for axis in axes) for axes in named]
    return tuple(-(-size // count) * count for size, count in zip(shape, parts, strict=True))


def make_layout(parallel: Parallel, devices: Sequence[jax.Device] | None = None) -> Layout:
    """Places a setting on devices.

    Args:
      parallel: The setting, with a known ep (see `layout.parallel.fit_parallel`).
      devices: As many as it needs, those of a tensor group adjacent; by default the first available ones (see
        `find_devices`).

    Raises:
      ValueError: If there are too few devices, or some devices of several processes would be left without work.
    """
    wanted = parallel.num_devices
    if devices is None:
        devices = find_devices(wanted)
        if len(devices) < wanted or (len(devices) > wanted and jax.process_count() > 1):
            raise ValueError(_wrong_count(parallel, len(devices)))
        devices = devices[:wanted]
    elif len(devices) != wanted:
        raise ValueError(f"{parallel} needs {wanted} devices, and {len(devices)} are given")
    shape = parallel.mesh_shape
    mesh = Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    exchange = parallel.exchange
    if exchange == "auto":
        # Devices that have different experts of the same layer, one group per row.
        groups = np.asarray(devices).reshape(shape).transpose(1, 3, 0, 2).reshape(shape[1] * shape[3], -1)
        is_far = any(count_hosts(list(group)) > 1 for group in groups)
        exchange = "all_to_all" if is_far and parallel.attention == "data" else "gather"
    return Layout(mesh, dataclasses.replace(parallel, exchange=exchange))


def count_hosts(devices: Sequence[jax.Device]) -> int:
    """Number of machines (domains of fast links) with these devices, as far as the backend says; 1 for CPUs."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def find_devices(count: int = 1) -> list[jax.Device]:
    """The available devices.

    Args:
      count: How many devices a CPU should look like; no effect once a computation has started. The variable
        STEP3_CPU_DEVICES takes precedence, as do JAX's own setting, XLA's flag and a launcher; GPUs are not affected.

    Returns:
      All devices of the default platform, of all processes; there may be more or fewer than `count`.

    Raises:
      ValueError: If STEP3_CPU_DEVICES is not a number, or JAX_PLATFORMS names a platform that is not installed or not
        there; the message says what to install.
    """
    # A number chosen in another way is kept.
    is_chosen = jax.config.values["jax_num_cpu_devices"] > 0 or _XLA_CPU_DEVICES in os.environ.get("XLA_FLAGS", "")
    if not is_chosen and os.environ.get(COORDINATOR) is None:
        chosen = read_number(os.environ, CPU_DEVICES, 1) if os.environ.get(CPU_DEVICES) else count
        # A computation has started: if there are too few, the caller says so.
        if chosen > 1:
            with contextlib.suppress(RuntimeError):
                jax.config.update("jax_num_cpu_devices", chosen)
    limit_threads()
    try:
        return jax.devices()
    except (AssertionError, RuntimeError) as error:
        if wanted := jax.config.values["jax_platforms"]:
            raise ValueError(_missing_platform(wanted, str(error))) from None
        raise


def find_cpu_devices(count: int) -> list[jax.Device]:
    """The first CPU devices of this process, whatever the default platform is.

    Raises:
      ValueError: If JAX_PLATFORMS leaves CPUs out, or there are fewer.
    """
    try:
        devices = jax.local_devices(backend="cpu")
    except RuntimeError:
        wanted = jax.config.values["jax_platforms"]
        raise ValueError(
            f"JAX_PLATFORMS is {wanted!r}, which leaves out the CPU devices that were asked for: set it to {wanted},cpu, or "
            "unset it"
        ) from None
    if len(devices) < count:
        raise ValueError(f"{count} CPU devices are needed, and there are {len(devices)}: {too_few_cpu_devices(count)}")
    return devices[:count]


def force_cpu_devices(count: int) -> None:
    """Makes one CPU look like `count` devices, if no computation has started; GPUs are not affected.

    The variable STEP3_CPU_DEVICES takes precedence, and so does the launcher with several processes.
    """
    if os.environ.get(CPU_DEVICES) is None and os.environ.get(COORDINATOR) is None:
        set_cpu_devices(count)


def _wrong_count(parallel: Parallel, num_devices: int) -> str:
    """Why the available devices are not enough, and what to do."""
    if jax.process_count() > 1:
        return (
            f"{parallel} is for {parallel.num_devices} devices, and the {jax.process_count()} processes have "
            f"{num_devices} together: all must be used"
        )
    platform = jax.default_backend()
    hint = too_few_cpu_devices(parallel.num_devices) if platform == "cpu" else "lower dp or tp, or use step3 launch"
    return f"{parallel} needs {parallel.num_devices} devices, and there are {num_devices} ({platform}): {hint}"


def _missing_platform(wanted: str, reason: str) -> str:
    """Why the platforms of JAX_PLATFORMS are not there, and what to do."""
    text = f"JAX_PLATFORMS is {wanted!r}, and JAX has no such device here"
    otherwise = "JAX_PLATFORMS=cpu computes on the CPU"
    if not {"cuda", "gpu"} & set(wanted.split(",")):
        return f"{text} ({reason.partition('. (')[0]}): {otherwise}"
    if not any(importlib.util.find_spec(name) for name in _GPU_PLUGINS):
        return (
            f"{text}: JAX is installed only for CPUs. For an NVIDIA GPU: pip install 'step3-jax[cuda13]' (driver 580 or "
            f"later; [cuda12] for driver 525 or later); {otherwise}"
        )
    said = f" ({' '.join(reason.split())})" if reason.strip() else ""
    return (
        f"{text}, although its CUDA plugin is installed{said}: does nvidia-smi show the GPU and its driver? {otherwise}"
    )
