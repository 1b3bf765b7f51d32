"""How many processes a command needs, which rank runs on which host with which device, and the table that shows it.

The only module here that reads words of the command: `--afd`, `--dp`, `--tp` and `--ep`, and `--config`. What a
topology means and which ranks have which role is defined in `step3_jax/layout/deployment.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Mapping, Sequence

from step3_jax.engine.config import read_config_file
from step3_jax.layout.deployment import Deployment, Topology, load_deployment, parse_deployment, read_afd

# As in `step3_jax/engine/config.py`: groups, devices of a group, groups of experts.
_SIZES = {
    "dp": ("--dp", "--data-parallel-size"),
    "tp": ("--tp", "--tensor-parallel-size"),
    "ep": ("--ep", "--expert-parallel-size"),
}
_MAX_ROWS = 64


@dataclasses.dataclass(frozen=True)
class Need:
    """The devices that a command needs.

    Attributes:
      option: The words that say so, such as "--afd 2a2f" or "--dp 2 --tp 4".
      num_devices: All of them.
      topology: Instances of the two roles, if they are on separate devices.
    """

    option: str
    num_devices: int
    topology: Topology | None = None

    def processes(self, devices_per_process: int = 1) -> int:
        """The number of processes that hold the devices, `devices_per_process` each.

        Raises:
          ValueError: If they do not divide evenly, or a process would hold parts of two instances (one process for a
            whole topology is fine).
        """
        topology = self.topology
        if devices_per_process == self.num_devices:
            return 1
        if topology is None and self.num_devices % devices_per_process:
            raise ValueError(
                f"{self.option} is for {self.num_devices} devices, which processes of {devices_per_process} do not divide "
                f"evenly: give a divisor of {self.num_devices}"
            )
        if topology is not None and topology.devices_per_instance % devices_per_process:
            raise ValueError(
                f"{self.option} has {topology.devices_per_instance} device(s) per instance, which processes of "
                f"{devices_per_process} devices do not divide evenly: give a divisor of {topology.devices_per_instance}, or "
                f"{self.num_devices} with one process"
            )
        return self.num_devices // devices_per_process


def read_need(words: Sequence[str]) -> Need | None:
    """Finds the devices that a command needs; None if it runs on any number of processes.

    Args:
      words: Words of the command, such as `["generate", "--dp", "2", "-p", "Hello"]`.

    Raises:
      ValueError: If the options cannot be read.
    """
    topology = read_topology(words)
    if topology is not None:
        return Need(f"--afd {topology.spec}", topology.num_devices, topology)
    parser = _parser()
    for name, options in _SIZES.items():
        parser.add_argument(*options, dest=name)
    found = {name: value for name, value in vars(_parse(parser, words)).items() if value is not None}
    found = _sizes_of_file(words) | found
    for name, value in found.items():
        if not value.isdecimal() or int(value) < 1:
            raise ValueError(f"in the command to launch: --{name} {value}; a whole number of at least 1 is needed")
    # Alone, --ep is the number of devices.
    if found.keys() & {"dp", "tp"}:
        found.pop("ep", None)
    if not found:
        return None
    option = " ".join(f"--{name} {value}" for name, value in found.items())
    return Need(option, math.prod(int(value) for value in found.values()))


def reads_input(words: Sequence[str]) -> bool:
    """Whether a command reads standard input: `chat`, or one with the word -, as in `generate -p -`.

    Others get none, so that the shell keeps its terminal, and a loop in a script its input.
    """
    return words[:1] == ["chat"] or "-" in words


def read_topology(words: Sequence[str]) -> Topology | None:
    """Finds the topology among the words of a command.

    Args:
      words: Words of the command, such as `["generate", "--afd", "2a2f", "-p", "Hello"]`.

    Returns:
      The topology; None if the words do not name one.

    Raises:
      ValueError: If `--afd` or `--afd-devices` cannot be read.
    """
    parser = _parser()
    parser.add_argument("--afd")
    parser.add_argument("--afd-devices")
    found = _parse(parser, words)
    if found.afd is None:
        deployment = _deployment_of_file(words)
        return None if deployment is None else deployment.topology
    devices = found.afd_devices
    if devices is not None and not devices.isdecimal():
        raise ValueError(f"--afd-devices {devices}: give the devices of an instance, 1 or more")
    deployment = read_afd(found.afd, None if devices is None else int(devices))
    return None if deployment is None else deployment.topology


def _sizes_of_file(words: Sequence[str]) -> dict[str, str]:
    """The sizes that a configuration file gives, by their short names."""
    path = _config_file(words)
    if path is None:
        return {}
    fields, _ = read_config_file(path)
    names = {"data_parallel_size": "dp", "tensor_parallel_size": "tp", "expert_parallel_size": "ep"}
    sizes = {short: str(fields[name]) for name, short in names.items() if fields.get(name) is not None}
    deployment = _deployment_of_file(words)
    if deployment is not None and deployment.topology is None:
        parallel = deployment.parallel
        sizes = {"dp": str(parallel.dp), "tp": str(parallel.tp)} | sizes
    return sizes


def _deployment_of_file(words: Sequence[str]) -> Deployment | None:
    path = _config_file(words)
    section = None if path is None else read_config_file(path)[1]
    if section is None:
        return None
    return load_deployment(section) if isinstance(section, str) else parse_deployment("deployment", section)


def _config_file(words: Sequence[str]) -> str | None:
    parser = _parser()
    parser.add_argument("--config")
    return _parse(parser, words).config


def _parser() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog="step3", add_help=False, allow_abbrev=False, exit_on_error=False)


def _parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    try:
        return parser.parse_known_args(list(words))[0]
    except argparse.ArgumentError as error:
        raise ValueError(f"in the command to launch: {error}") from None


@dataclasses.dataclass(frozen=True)
class Host:
    """A machine of the run.

    Attributes:
      name: As given.
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
      devices: Its devices, for the table.
      role: Its name in messages: "attention 0", "ffn 1", "rank 3" where all do the same.
    """

    rank: int
    host: int
    gpu: str | None
    devices: str
    role: str


def choose_platform(platform: str, hosts: Sequence[Host], user: Mapping[str, str]) -> str:
    """ "cpu" or "cuda".

    Raises:
      ValueError: If only some hosts have GPUs that JAX can use, or cuda is requested where there are none.
    """
    named = user.get("JAX_PLATFORMS", "").partition(",")[0] if platform == "auto" else platform
    if named == "cpu":
        return "cpu"
    without = [host.name for host in hosts if not host.gpus]
    if named in ("cuda", "gpu") and without:
        raise ValueError(f"{without[0]} has no GPU that JAX can use (is JAX's CUDA plugin installed there?)")
    if without and len(without) < len(hosts):
        raise ValueError(
            f"{without[0]} has no GPU that JAX can use, but others have: leave it out, or give --platform cpu"
        )
    return "cpu" if without else "cuda"


def count_processes(
    hosts: Sequence[Host], *, per_host: int | None, platform: str, need: Need | None, devices_per_process: int
) -> int:
    """Processes on each host.

    Args:
      hosts: The machines.
      per_host: The requested number. If absent, what the command needs, divided over the hosts; if it does not say, the
        GPUs, or 1.
      platform: "cpu" or "cuda".
      need: The launched command's needs.
      devices_per_process: Devices of each.

    Raises:
      ValueError: If the number does not fit the command, or does not divide evenly over the hosts.
    """
    if per_host is None and need is not None:
        needed = need.processes(devices_per_process)
        if needed % len(hosts):
            raise ValueError(
                f"{need.option} needs {needed} processes, which {len(hosts)} hosts cannot divide evenly: give a number of "
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
      ValueError: If it does not.
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
      topology: The launched command's topology.
      devices_per_process: Devices of each, on CPU.
      first_local: Ranks that others start on the same host before these (tasks of a scheduler).
      num_local: All ranks on that host; `count` if absent.

    Raises:
      ValueError: If the host does not have enough GPUs.
    """
    num_local = count if num_local is None else num_local
    # Slurm may show each task only its own GPU.
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
            role = f"rank {rank}"
        else:
            first = topology.role_of(rank * devices_per_process)
            last = topology.role_of((rank + 1) * devices_per_process - 1)
            role = first if first == last else "all"
        ranks.append(Rank(rank, host_index, gpu, devices, role))
    return ranks


def format_table(ranks: Sequence[Rank], hosts: Sequence[Host]) -> list[str]:
    """Rows of host, device and role for each rank, with a heading; shortened for a large job."""
    rows = [("rank", "host", "device", "role")]
    rows += [(str(rank.rank), hosts[rank.host].name, rank.devices, rank.role) for rank in ranks[:_MAX_ROWS]]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        "  ".join([*(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows
    ]
    return [*lines, f"... and {len(ranks) - _MAX_ROWS} more"] if len(ranks) > _MAX_ROWS else lines
