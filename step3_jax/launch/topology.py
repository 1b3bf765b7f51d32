"""What the launched command says about its devices: how many processes it needs.

The only place of this package that knows of `--afd`, of `--dp`, `--tp` and `--ep`, and of `--config`. What a topology means
and which ranks are which role is said in `step3_jax/layout/deployment.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence

from step3_jax.engine.config import read_config_file
from step3_jax.layout.deployment import Deployment, Topology, load_deployment, parse_deployment, read_afd

# As `step3_jax/engine/config.py` has them: groups, devices of a group, groups of experts.
_SIZES = {
    "dp": ("--dp", "--data-parallel-size"),
    "tp": ("--tp", "--tensor-parallel-size"),
    "ep": ("--ep", "--expert-parallel-size"),
}


@dataclasses.dataclass(frozen=True)
class Need:
    """The devices that a command asks for.

    Attributes:
      option: The words that ask for them, such as "--afd 2a2f" or "--dp 2 --tp 4".
      num_devices: All of them.
      topology: Instances of the two roles, where they are apart.
    """

    option: str
    num_devices: int
    topology: Topology | None = None

    def processes(self, devices_per_process: int = 1) -> int:
        """Processes that hold the devices, `devices_per_process` each.

        Raises:
          ValueError: If they cannot share them out, or a process would hold parts of two instances (one process for a
            whole topology is fine).
        """
        topology = self.topology
        if devices_per_process == self.num_devices:
            return 1
        if topology is None and self.num_devices % devices_per_process:
            raise ValueError(
                f"{self.option} is for {self.num_devices} devices, which processes of {devices_per_process} cannot share "
                f"out: give a divisor of {self.num_devices}"
            )
        if topology is not None and topology.devices_per_instance % devices_per_process:
            raise ValueError(
                f"{self.option} has {topology.devices_per_instance} device(s) an instance, which processes of "
                f"{devices_per_process} devices cannot share out: give a divisor of {topology.devices_per_instance}, or "
                f"{self.num_devices} with one process"
            )
        return self.num_devices // devices_per_process


def read_need(words: Sequence[str]) -> Need | None:
    """Finds what a command asks for; None if it runs on any number of processes.

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


def read_topology(words: Sequence[str]) -> Topology | None:
    """Finds the topology among the words of a command.

    Args:
      words: Words of the command, such as `["generate", "--afd", "2a2f", "-p", "Hello"]`.

    Returns:
      The topology; None where the words name none.

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
