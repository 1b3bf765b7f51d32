"""What the launched command says about its topology: how many processes it needs.

The only place of this package that knows of `--afd`. What its value means and which ranks are which role is said in
`step3_jax/deployment.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from step3_jax.deployment import Topology, read_afd


def read_topology(words: Sequence[str]) -> Topology | None:
    """Finds the topology among the words of a command.

    Args:
      words: Words of the command, such as `["generate", "--afd", "2a2f", "-p", "Hello"]`.

    Returns:
      The topology; None where the words name none.

    Raises:
      ValueError: If `--afd` or `--afd-devices` cannot be read.
    """
    parser = argparse.ArgumentParser(prog="step3", add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--afd")
    parser.add_argument("--afd-devices")
    try:
        found, _ = parser.parse_known_args(list(words))
    except argparse.ArgumentError as error:
        raise ValueError(f"in the command to launch: {error}") from None
    if found.afd is None:
        return None
    devices = found.afd_devices
    if devices is not None and not devices.isdecimal():
        raise ValueError(f"--afd-devices {devices}: give the devices of an instance, 1 or more")
    deployment = read_afd(found.afd, None if devices is None else int(devices))
    return None if deployment is None else deployment.topology


def processes_of(topology: Topology, devices_per_process: int = 1) -> int:
    """Processes that a topology needs.

    Args:
      topology: The instances.
      devices_per_process: Devices that each process holds.

    Raises:
      ValueError: If a process would hold parts of two instances (one process for the whole topology is fine).
    """
    if devices_per_process == topology.num_devices:
        return 1
    if topology.devices_per_instance % devices_per_process:
        raise ValueError(
            f"--afd {topology.spec} has {topology.devices_per_instance} device(s) an instance, which processes of "
            f"{devices_per_process} devices cannot share out: give a divisor of {topology.devices_per_instance}, or "
            f"{topology.num_devices} with one process"
        )
    return topology.num_devices // devices_per_process
