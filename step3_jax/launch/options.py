"""The launcher's options, their checks, and the environment of a rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from step3_jax.rank import COORDINATOR, CPU_DEVICES, NUM_PROCESSES, PROCESS_ID, ROLE

LOOPBACK = "127.0.0.1"
PLATFORMS = ("auto", "cpu", "cuda")
# No prompts, as there may be no user to answer; no wait of minutes for a host that is off.
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-T")
_MIN_DEADLINE_S, _MIN_RANK_DEADLINE_S = 1.0, 2.0
# Settings that a user makes here and expects there, excluding a host's own devices and paths.
FORWARDED = ("STEP3_", "JAX_", "XLA_", "NCCL_", "HF_", "TF_CPP_")
# All of them exist in every jaxlib that this project supports: XLA ends a process that has one it does not know.
_XLA_GPU_FLAGS = {
    # The processes compile different programs (one per role), so they cannot share the tuning of one.
    "--xla_gpu_shard_autotuning": "false",
    # Starts collectives early and waits late, so that the exchange overlaps with compute.
    "--xla_gpu_enable_latency_hiding_scheduler": "true",
    # A lost peer ends the process, which would otherwise wait for ever.
    "--xla_gpu_nccl_terminate_on_error": "true",
}


@dataclasses.dataclass(frozen=True)
class LaunchOptions:
    """Where and how to start.

    Attributes:
      local: Processes on this machine.
      hosts: Names for ssh. Neither `local` nor `hosts`: the scheduler that started this process is asked.
      processes_per_host: Processes on each host, or in each task of a scheduler.
      devices_per_process: Devices of a process, on CPU. On GPU a process has one.
      platform: "auto", "cpu" or "cuda".
      coordinator: Address at which all hosts reach rank 0's host, if it cannot be determined.
      port: Port of the coordinator; a free one if absent.
      grace_s: Time from SIGTERM to SIGKILL.
      deadline_s: Silence after which a host counts as lost, in either direction.
      rank_deadline_s: The longest a rank may make no progress, and others may wait for one that has ended.
      shutdown_s: Only rank 0 gets a signal, and has this long to end before the others get it; 0: all get it at once.
      environment: Variables for all ranks.
      ssh: ssh with its options.
      remote_python: The interpreter on the other hosts; this one's path if absent.
      remote_directory: Where the ranks run there; the same as here if absent.
    """

    local: int | None = None
    hosts: tuple[str, ...] = ()
    processes_per_host: int | None = None
    devices_per_process: int = 1
    platform: str = "auto"
    coordinator: str | None = None
    port: int | None = None
    grace_s: float = 5.0
    deadline_s: float = 15.0
    rank_deadline_s: float = 60.0
    shutdown_s: float = 0.0
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ssh: tuple[str, ...] = SSH
    remote_python: str | None = None
    remote_directory: str | None = None


def check_options(words: Sequence[str], options: LaunchOptions) -> None:
    """Refuses conflicting or impossible options.

    Raises:
      ValueError: For these; the message says what to type instead.
    """
    if not words:
        raise ValueError("what to start? Give a command after --, such as: step3 launch --local 2 -- generate -p Hello")
    if options.local is not None and options.hosts:
        raise ValueError("--local is for this machine and --hosts for others: give one of them")
    if options.local is not None and options.processes_per_host is not None:
        raise ValueError("--local already says how many processes: leave out --processes-per-host")
    if options.platform not in PLATFORMS:
        raise ValueError(f"platform is {options.platform!r}: give one of {', '.join(PLATFORMS)}")
    counts = {
        "--local": options.local,
        "--processes-per-host": options.processes_per_host,
        "--devices-per-process": options.devices_per_process,
    }
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} is {count}: give 1 or more")
    if options.port is not None:
        check_port(options.port)
    if options.deadline_s < _MIN_DEADLINE_S:
        raise ValueError(f"--deadline is {options.deadline_s:g}: give {_MIN_DEADLINE_S:g} s or more")
    if options.rank_deadline_s < _MIN_RANK_DEADLINE_S:
        raise ValueError(
            f"--rank-deadline is {options.rank_deadline_s:g}: give {_MIN_RANK_DEADLINE_S:g} s or more; on a busy machine a "
            "rank may be silent for a second"
        )
    if options.grace_s < 0:
        raise ValueError(f"--grace is {options.grace_s:g}: give 0 s or more")


def check_port(port: str | int) -> int:
    """Parses a port.

    Raises:
      ValueError: If it is not a valid port.
    """
    if not str(port).isdecimal() or not 1 <= int(port) <= 65535:
        raise ValueError(f"{port} is not a port: give a number from 1 to 65535")
    return int(port)


def forwarded_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The part of an environment that goes with a command to another host."""
    return {name: value for name, value in environment.items() if name.startswith(FORWARDED)}


def rank_environment(
    *,
    rank: int,
    role: str,
    num_processes: int,
    coordinator: str,
    gpu: str | None,
    cpu_devices: int = 1,
    user: Mapping[str, str],
) -> dict[str, str]:
    """The variables set for one rank.

    Args:
      rank: Its number.
      role: Its name in messages: "attention 0", "ffn 1", "rank 3".
      num_processes: All of them.
      coordinator: "host:port" of rank 0's coordination service.
      gpu: The rank's only GPU, in the form of CUDA_VISIBLE_DEVICES; None for CPU.
      cpu_devices: Devices of the rank on CPU.
      user: The user's environment. Its settings of XLA and NCCL take precedence.

    Returns:
      The variables, without those of `user` that are unchanged.
    """
    host = coordinator.rpartition(":")[0].strip("[]")
    # gRPC would go through a web proxy to reach the coordinator.
    direct = [part for part in user.get("no_proxy", user.get("NO_PROXY", "")).split(",") if part]
    found = {
        COORDINATOR: coordinator,
        NUM_PROCESSES: str(num_processes),
        PROCESS_ID: str(rank),
        ROLE: role,
        # The rank's first device is its only one. Without this, JAX under Slurm takes the one with the rank's number.
        "JAX_LOCAL_DEVICE_IDS": "0",
        "no_proxy": ",".join([*direct, *([] if host in direct else [host])]),
    }
    if gpu is None:
        return found | {"JAX_PLATFORMS": "cpu", CPU_DEVICES: str(cpu_devices)}
    return found | {
        "JAX_PLATFORMS": "cuda,cpu",
        "CUDA_VISIBLE_DEVICES": gpu,
        "XLA_FLAGS": _merge_flags(user.get("XLA_FLAGS", ""), _XLA_GPU_FLAGS),
        "NCCL_DEBUG": user.get("NCCL_DEBUG", "WARN"),
    }


def _merge_flags(given: str, ours: Mapping[str, str]) -> str:
    names = {word.partition("=")[0] for word in given.split()}
    return " ".join([*given.split(), *(f"{name}={value}" for name, value in ours.items() if name not in names)])
