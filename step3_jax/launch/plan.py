"""Which rank runs on which host with which device, and the table that shows it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from step3_jax.launch.environment import rank_environment
from step3_jax.launch.topology import Need
from step3_jax.layout.deployment import Topology

PLATFORMS = ("auto", "cpu", "cuda")
_MAX_ROWS = 64


@dataclasses.dataclass(frozen=True)
class Host:
    """A machine that takes part.

    Attributes:
      name: As it was given.
      gpus: Ids of its GPUs.
    """

    name: str
    gpus: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Rank:
    """One process to start.

    Attributes:
      rank: Its number.
      host: Index of its host.
      gpu: Its GPU there; None on CPU.
      devices: For the table.
      role: For the table.
    """

    rank: int
    host: int
    gpu: str | None
    devices: str
    role: str


def choose_platform(platform: str, hosts: Sequence[Host], user: Mapping[str, str]) -> str:
    """ "cpu" or "cuda".

    Raises:
      ValueError: If some hosts have GPUs that JAX can use and some have none, or cuda is asked for where there are none.
    """
    named = user.get("JAX_PLATFORMS", "").partition(",")[0] if platform == "auto" else platform
    if named == "cpu":
        return "cpu"
    without = [host.name for host in hosts if not host.gpus]
    if named in ("cuda", "gpu") and without:
        raise ValueError(f"{without[0]} has no GPU that JAX can use (is JAX's CUDA plugin installed there?)")
    if without and len(without) < len(hosts):
        raise ValueError(
            f"{without[0]} has no GPU that JAX can use and others have: leave it out, or give --platform cpu"
        )
    return "cpu" if without else "cuda"


def count_processes(
    hosts: Sequence[Host], *, per_host: int | None, platform: str, need: Need | None, devices_per_process: int
) -> int:
    """Processes on each host.

    Args:
      hosts: The machines.
      per_host: What was asked for. If absent: what the command needs, shared out; if it does not say the GPUs, or 1.
      platform: "cpu" or "cuda".
      need: Of the launched command.
      devices_per_process: Devices of each.

    Raises:
      ValueError: If the number does not fit the command, or the hosts cannot share it out.
    """
    if per_host is None and need is not None:
        needed = need.processes(devices_per_process)
        if needed % len(hosts):
            raise ValueError(
                f"{need.option} needs {needed} processes, which {len(hosts)} hosts cannot share out: give a number of "
                f"hosts that divides {needed}"
            )
        per_host = needed // len(hosts)
    if per_host is None:
        per_host = min(len(host.gpus) for host in hosts) if platform == "cuda" else 1
    check_count(per_host * len(hosts), need, devices_per_process)
    return per_host


def check_count(num_processes: int, need: Need | None, devices_per_process: int) -> None:
    """Refuses a number of processes that does not fit the command.

    Raises:
      ValueError: That.
    """
    if need is None or num_processes == (needed := need.processes(devices_per_process)):
        return
    topology, what = need.topology, f"{need.num_devices} device(s)"
    if topology is not None:
        instances = topology.num_attention + topology.num_ffn
        what = f"{instances} instances of {topology.devices_per_instance} device(s)"
    alone = "" if needed == 1 else f", or 1 with --devices-per-process {need.num_devices}"
    raise ValueError(
        f"{need.option} needs {needed} processes ({what}, {devices_per_process} in a process), not {num_processes}: "
        f"start {needed}{alone}"
    )


def place_ranks(
    host: Host,
    *,
    host_index: int,
    first_rank: int,
    count: int,
    platform: str,
    topology: Topology | None,
    devices_per_process: int,
    first_local: int = 0,
    num_local: int | None = None,
) -> list[Rank]:
    """The ranks of one host.

    Args:
      host: The machine.
      host_index: Its number.
      first_rank: Number of its first rank here.
      count: Ranks that are started here.
      platform: "cpu" or "cuda".
      topology: Of the launched command.
      devices_per_process: Devices of each, on CPU.
      first_local: Ranks that others start on the same host before these (tasks of a scheduler).
      num_local: All ranks on that host; `count` if absent.

    Raises:
      ValueError: If the host has not enough GPUs.
    """
    num_local = count if num_local is None else num_local
    # Slurm may show each of its tasks one GPU of its own.
    is_own = len(host.gpus) == count < num_local
    if platform == "cuda" and not is_own and len(host.gpus) < num_local:
        raise ValueError(
            f"{num_local} processes on {host.name}, which has {len(host.gpus)} GPU(s): one process has one GPU"
        )
    ranks = []
    for number in range(count):
        rank = first_rank + number
        gpu = host.gpus[number if is_own else first_local + number] if platform == "cuda" else None
        devices = (
            f"gpu {gpu}" if gpu is not None else "cpu" if devices_per_process == 1 else f"{devices_per_process} cpus"
        )
        if topology is None:
            role = "-"
        else:
            first = topology.role_of(rank * devices_per_process)
            last = topology.role_of((rank + 1) * devices_per_process - 1)
            role = first if first == last else "all"
        ranks.append(Rank(rank, host_index, gpu, devices, role))
    return ranks


def environment_of(
    rank: Rank, *, num_processes: int, coordinator: str, devices_per_process: int, user: Mapping[str, str]
) -> dict[str, str]:
    """What is set for a rank, `rank_environment` with its place."""
    return rank_environment(
        rank=rank.rank,
        num_processes=num_processes,
        coordinator=coordinator,
        gpu=rank.gpu,
        cpu_devices=devices_per_process,
        user=user,
    )


def format_table(ranks: Sequence[Rank], hosts: Sequence[Host]) -> list[str]:
    """Rows of host, device and role for each rank, with a heading; those of a large job in part."""
    rows = [("rank", "host", "device", "role")]
    rows += [(str(rank.rank), hosts[rank.host].name, rank.devices, rank.role) for rank in ranks[:_MAX_ROWS]]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        "  ".join([*(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows
    ]
    return [*lines, f"... and {len(ranks) - _MAX_ROWS} more"] if len(ranks) > _MAX_ROWS else lines
