"""What the launched command says about its topology: how many processes it needs, and what each of them is.

The only place of this package that knows how `--afd` is spelled and which ranks are which role.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Sequence

_SPEC = re.compile(r"([1-9][0-9]*)a([1-9][0-9]*)f", re.IGNORECASE)
# Values of --afd that ask for no instances: nothing is disaggregated.
_WITHOUT = ("off",)


@dataclasses.dataclass(frozen=True)
class Topology:
    """Instances of the two roles, attention first.

    Attributes:
      spec: As it was given, such as "2a1f".
      num_attention: Attention instances.
      num_ffn: FFN instances.
      devices_per_instance: Devices of each.
    """

    spec: str
    num_attention: int
    num_ffn: int
    devices_per_instance: int

    @property
    def num_devices(self) -> int:
        """Devices of all instances."""
        return (self.num_attention + self.num_ffn) * self.devices_per_instance

    def role_of(self, device: int) -> str:
        """Role of a device, by its number among all devices: "attention 0", "ffn 1"."""
        instance = device // self.devices_per_instance
        is_attention = instance < self.num_attention
        return f"attention {instance}" if is_attention else f"ffn {instance - self.num_attention}"


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
    parser.add_argument("--afd-devices", default="1")
    try:
        found, _ = parser.parse_known_args(list(words))
    except argparse.ArgumentError as error:
        raise ValueError(f"in the command to launch: {error}") from None
    if found.afd is None or found.afd.lower() in _WITHOUT:
        return None
    if not found.afd_devices.isdecimal() or int(found.afd_devices) < 1:
        raise ValueError(f"--afd-devices {found.afd_devices}: give the devices of an instance, 1 or more")
    return parse_topology(found.afd, int(found.afd_devices))


def parse_topology(spec: str, devices_per_instance: int = 1) -> Topology:
    """Reads "xAyF".

    Args:
      spec: x attention and y FFN instances, such as "2a1f"; upper or lower case.
      devices_per_instance: Devices of each instance.

    Raises:
      ValueError: If the spec is not of that form, or an instance has no device.
    """
    match = _SPEC.fullmatch(spec.strip())
    if match is None:
        raise ValueError(f"--afd {spec}: give the instances of attention and FFN as xAyF, such as 1a1f or 2a2f")
    if devices_per_instance < 1:
        raise ValueError(f"an instance of {spec} has {devices_per_instance} devices: it needs at least 1")
    return Topology(spec, int(match[1]), int(match[2]), devices_per_instance)


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
