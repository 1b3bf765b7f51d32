"""Devices: the start of jax.distributed, the mesh of a parallel setting, and which axes of it mean what."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
import socket
import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from step3_jax.layout.parallel import AttentionForm, Parallel
from step3_jax.layout.table import AXES, mesh_axes
from step3_jax.sharding import parameter_spec

# What `step3 launch` sets for each process.
COORDINATOR, NUM_PROCESSES, PROCESS_ID = "STEP3_COORDINATOR", "STEP3_NUM_PROCESSES", "STEP3_PROCESS_ID"
CPU_DEVICES = "STEP3_CPU_DEVICES"
# Seconds that the processes may take to find each other.
START_TIMEOUT = "STEP3_START_TIMEOUT"
DEFAULT_START_TIMEOUT_S = 120
_GO = b"go\n"
VARIABLES = (COORDINATOR, NUM_PROCESSES, PROCESS_ID, CPU_DEVICES)
_GPU_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
# What XLA itself reads; JAX refuses it beside a number of its own.
_XLA_CPU_DEVICES = "xla_force_host_platform_device_count"


@dataclasses.dataclass(frozen=True)
class Layout:
    """A parallel setting on its devices.

    Attributes:
      mesh: The devices, along `layout.table.AXES`.
      parallel: The setting, with nothing left open: ep is a number, and the exchange is chosen.
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
        """Parts that a logical axis is cut in."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes(logical))

    def spec(self, *logical: str | None) -> PartitionSpec:
        """Of an array whose first axes have these logical names."""
        return PartitionSpec(*(self.axes(name) or None if name is not None else None for name in logical))

    def sharding(self, *logical: str | None) -> NamedSharding:
        """As `spec`; without names every device has a copy."""
        return NamedSharding(self.mesh, self.spec(*logical))

    def parameter(self, path: Sequence[str | int]) -> NamedSharding:
        """Where the parameter at `path` of a `Step3` lies, in the shape of `sharding.view_shape`."""
        return NamedSharding(self.mesh, parameter_spec(path, self.attention, self.parallel.vision))


def padded_shape(shape: tuple[int, ...], sharding: NamedSharding) -> tuple[int, ...]:
    """The shape of an array whose axes are filled up with zeros to what their devices divide."""
    entries = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
    named = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in entries]
    parts = [math.prod(sharding.mesh.shape[axis] for axis in axes) for axes in named]
    return tuple(-(-size // count) * count for size, count in zip(shape, parts, strict=True))


def make_layout(parallel: Parallel, devices: Sequence[jax.Device] | None = None) -> Layout:
    """Places a setting on devices.

    Args:
      parallel: The setting, its ep known (see `layout.parallel.fit_parallel`).
      devices: As many as it needs, those of a tensor group side by side; by default the first of all there are (see
        `find_devices`).

    Raises:
      ValueError: If there are too few devices, or some of a process of several would be left without work.
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
        # Devices that have different experts of the same layer, one group a row.
        groups = np.asarray(devices).reshape(shape).transpose(1, 3, 0, 2).reshape(shape[1] * shape[3], -1)
        is_far = any(count_hosts(list(group)) > 1 for group in groups)
        exchange = "all_to_all" if is_far and parallel.attention == "data" else "gather"
    return Layout(mesh, dataclasses.replace(parallel, exchange=exchange))


def count_hosts(devices: Sequence[jax.Device]) -> int:
    """Machines (domains of fast links) that devices are on, as far as the backend tells; 1 for CPUs."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def find_devices(count: int = 1) -> list[jax.Device]:
    """The devices there are.

    Args:
      count: How many a CPU is to look like, if no computation has begun: then it cannot be changed any more. The variable
        STEP3_CPU_DEVICES wins, as do JAX's own setting, XLA's flag and a launcher; GPUs are not touched.

    Returns:
      All devices of the default platform, of all processes; there may be more or fewer than `count`.

    Raises:
      ValueError: If STEP3_CPU_DEVICES is no number, or JAX_PLATFORMS asks for what is not installed or not there; the
        message says what to install.
    """
    # What was chosen in another way stays.
    is_chosen = jax.config.values["jax_num_cpu_devices"] > 0 or _XLA_CPU_DEVICES in os.environ.get("XLA_FLAGS", "")
    if not is_chosen and os.environ.get(COORDINATOR) is None:
        chosen = _read_number(os.environ, CPU_DEVICES, 1) if os.environ.get(CPU_DEVICES) else count
        # A computation has begun: the caller says so, if there are too few.
        if chosen > 1:
            with contextlib.suppress(RuntimeError):
                jax.config.update("jax_num_cpu_devices", chosen)
    try:
        return jax.devices()
    except (AssertionError, RuntimeError) as error:
        if wanted := jax.config.values["jax_platforms"]:
            raise ValueError(_missing_platform(wanted, str(error))) from None
        raise


def too_few_cpu_devices(wanted: int) -> str:
    """What to do about it, for a message."""
    return (
        f"the number is fixed once JAX has begun to compute: set {CPU_DEVICES}={wanted} before the program starts, or "
        f'jax.config.update("jax_num_cpu_devices", {wanted}) in it before anything else'
    )


def force_cpu_devices(count: int) -> None:
    """Makes one CPU look like `count` devices, if no computation has begun; GPUs are not touched.

    The variable STEP3_CPU_DEVICES wins, and so does the launcher, where there are several processes.
    """
    if os.environ.get(CPU_DEVICES) is None and os.environ.get(COORDINATOR) is None:
        _set_cpu_devices(count)


def initialise_distributed(environment: Mapping[str, str] | None = None) -> bool:
    """Joins the processes that `step3 launch` started, before the first use of a device.

    Args:
      environment: Where `VARIABLES` are read from; that of the process if absent. STEP3_CPU_DEVICES alone gives one
        process several CPU devices.

    Returns:
      Whether there are several processes.

    Raises:
      ValueError: If the variables are incomplete or wrong.
      TimeoutError: If the processes do not find each other within STEP3_START_TIMEOUT seconds (120); the message of
        process 0 names those that are missing.
    """
    environment = os.environ if environment is None else environment
    found = {name: environment[name] for name in (COORDINATOR, NUM_PROCESSES, PROCESS_ID) if environment.get(name)}
    if environment.get(CPU_DEVICES):
        _set_cpu_devices(_read_number(environment, CPU_DEVICES, 1))
    if not found:
        return False
    missing = [name for name in (COORDINATOR, NUM_PROCESSES, PROCESS_ID) if name not in found]
    if missing:
        raise ValueError(f"{', '.join(found)} is set, but not {', '.join(missing)}: set all three or none")
    address = found[COORDINATOR]
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"{COORDINATOR} is {address!r}; host:port of the process with the number 0 is needed")
    num_processes = _read_number(environment, NUM_PROCESSES, 1)
    rank = _read_number(environment, PROCESS_ID, 0)
    if rank >= num_processes:
        raise ValueError(
            f"{PROCESS_ID} is {rank}; of {num_processes} processes the numbers are 0 to {num_processes - 1}"
        )
    timeout_s = DEFAULT_START_TIMEOUT_S
    if environment.get(START_TIMEOUT):
        timeout_s = _read_number(environment, START_TIMEOUT, 1)
    # JAX ends a process from C++ when others do not come, without saying who: so they meet before.
    _meet(host.strip("[]"), int(port), rank, num_processes, timeout_s)
    # Who sets a proxy for all has been asked by the launcher to leave out the coordinator.
    jax.config.update("jax_check_proxy_envs", False)
    jax.distributed.initialize(
        address,
        num_processes,
        rank,
        initialization_timeout=max(timeout_s, DEFAULT_START_TIMEOUT_S),
        cluster_detection_method="deactivate",
    )
    return num_processes > 1


def agree(value: int) -> int:
    """The value of process 0, in all processes."""
    if jax.process_count() == 1:
        return value
    high, low = np.divmod(np.uint64(value), np.uint64(2**32))
    words = multihost_utils.broadcast_one_to_all(np.array([high, low], np.uint32))
    return int(words[0]) << 32 | int(words[1])


def agree_least(value: int) -> int:
    """The least value of all processes."""
    if jax.process_count() == 1:
        return value
    # In MiB: without 64-bit numbers JAX cuts them.
    return int(np.min(multihost_utils.process_allgather(np.array([value // 2**20], np.int32)))) * 2**20


def _set_cpu_devices(count: int) -> None:
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        have = len(jax.devices("cpu"))
        if have < count:
            raise ValueError(
                f"{count} CPU devices are wanted, but computing has begun with {have}; {too_few_cpu_devices(count)}"
            ) from None


def _read_number(environment: Mapping[str, str], name: str, least: int) -> int:
    text = environment.get(name, "")
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"{name} is {text!r}; a whole number of at least {least} is needed")
    return int(text)


def _meet(host: str, port: int, rank: int, num_processes: int, timeout_s: int) -> None:
    """Returns once all processes are there: each tells process 0, at the coordinator's address, and is told to go on."""
    deadline = time.monotonic() + timeout_s
    if rank:
        _report_to_coordinator(host, port, f"{rank} {num_processes}\n", deadline, timeout_s)
        return
    present: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(_listen(port))
        except OSError as error:
            raise ValueError(
                f"{COORDINATOR}: port {port} cannot be opened ({error.strerror}): another program has it, or a run before "
                "is not gone yet; name another port"
            ) from None
        while missing := [number for number in range(1, num_processes) if number not in present]:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                caller = stack.enter_context(server.accept()[0])
            except TimeoutError:
                raise TimeoutError(
                    f"of {num_processes} processes, number {', '.join(map(str, missing))} did not come to the coordinator "
                    f"at {host}:{port} within {timeout_s} s: see what they wrote, or raise {START_TIMEOUT}"
                ) from None
            words = _read_line(caller, deadline).split()
            # Anything else is no process of ours.
            if len(words) == 2 and all(word.isdecimal() for word in words) and 0 < int(words[0]) < num_processes:
                if int(words[1]) != num_processes:
                    raise ValueError(f"process {words[0]} is one of {words[1]}, and process 0 one of {num_processes}")
                present[int(words[0])] = caller
        for caller in present.values():
            with contextlib.suppress(OSError):
                caller.sendall(_GO)


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _report_to_coordinator(host: str, port: int, line: str, deadline: float, timeout_s: int) -> None:
    reason = "it did not answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=left) as connection:
                connection.sendall(line.encode())
                if _read_line(connection, deadline) == _GO.decode().strip():
                    return
        except OSError as error:
            reason = error.strerror or str(error)
        time.sleep(0.1)
    raise TimeoutError(
        f"process {line.partition(' ')[0]} was not called on by the coordinator (process 0) at {host}:{port} within "
        f"{timeout_s} s: {reason}. Is process 0 running, is the port open between the hosts, have all others come?"
    )


def _read_line(connection: socket.socket, deadline: float) -> str:
    """One short line of text; what has come if it does not end in time."""
    connection.settimeout(max(0.01, deadline - time.monotonic()))
    data = b""
    with contextlib.suppress(OSError):
        while not data.endswith(b"\n") and len(data) < 64 and (part := connection.recv(64)):
            data += part
    return data.decode(errors="replace").strip()


def _wrong_count(parallel: Parallel, num_devices: int) -> str:
    """Why the devices there are do not serve, and what to do."""
    if jax.process_count() > 1:
        return (
            f"{parallel} is for {parallel.num_devices} devices, and the {jax.process_count()} processes have "
            f"{num_devices} together: none may be left out"
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
            f"{text}: JAX is installed for CPUs alone. For an NVIDIA GPU: pip install 'step3-jax[cuda13]' (driver 580 or "
            f"later; [cuda12] for driver 525 or later); {otherwise}"
        )
    said = f" ({' '.join(reason.split())})" if reason.strip() else ""
    return (
        f"{text}, though its CUDA plugin is installed{said}: does nvidia-smi show the GPU and its driver? {otherwise}"
    )
