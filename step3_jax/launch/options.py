"""What the caller of the launcher chooses, and what of it does not fit together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from step3_jax.launch import address, plan
from step3_jax.launch.connection import SSH

_MIN_DEADLINE_S = 1.0


@dataclasses.dataclass(frozen=True)
class LaunchOptions:
    """Where and how to start.

    Attributes:
      local: Processes on this machine.
      hosts: Names for ssh. Neither `local` nor `hosts`: the scheduler that started this process is asked.
      processes_per_host: Processes on each host, or in each task of a scheduler.
      devices_per_process: Devices of a process, on CPU. On GPU a process has one.
      platform: "auto", "cpu" or "cuda".
      coordinator: Address at which all hosts reach rank 0's host, if it cannot be found out.
      port: Of the coordinator; a free one if absent.
      grace_s: From SIGTERM to SIGKILL.
      deadline_s: Silence after which a host counts as lost, in either direction.
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
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ssh: tuple[str, ...] = SSH
    remote_python: str | None = None
    remote_directory: str | None = None


def check_options(words: Sequence[str], options: LaunchOptions) -> None:
    """Refuses what cannot be meant.

    Raises:
      ValueError: That, with what to type instead.
    """
    if not words:
        raise ValueError("what to start? Give a command after --, such as: step3 launch --local 2 -- generate -p Hello")
    if options.local is not None and options.hosts:
        raise ValueError("--local is for this machine and --hosts for others: give one of them")
    if options.local is not None and options.processes_per_host is not None:
        raise ValueError("--local already says how many processes: leave out --processes-per-host")
    if options.platform not in plan.PLATFORMS:
        raise ValueError(f"platform is {options.platform!r}: give one of {', '.join(plan.PLATFORMS)}")
    counts = {
        "--local": options.local,
        "--processes-per-host": options.processes_per_host,
        "--devices-per-process": options.devices_per_process,
    }
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} is {count}: give 1 or more")
    if options.port is not None:
        address.check_port(options.port)
    if options.deadline_s < _MIN_DEADLINE_S:
        raise ValueError(f"--deadline is {options.deadline_s:g}: give {_MIN_DEADLINE_S:g} s or more")
    if options.grace_s < 0:
        raise ValueError(f"--grace is {options.grace_s:g}: give 0 s or more")
