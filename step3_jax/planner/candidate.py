"""The deployments that an inventory of devices allows, without their batch."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Literal

from step3_jax.config import ModelConfig
from step3_jax.layout.deployment import Deployment, Topology, Workload
from step3_jax.layout.hardware import Hardware, load_hardware
from step3_jax.layout.parallel import BOTH, FFN, Parallel, RoleName, find_problems
from step3_jax.layout.role import fp8_block
from step3_jax.planner.cost import Prices
from step3_jax.planner.pipeline import Machines

# Attention and FFN on separate devices; every device does both, in one group or in several.
Kind = Literal["afd", "ep", "tp"]
# Most devices of a role that are considered; the cost of larger deployments hardly changes, and several can be started.
MAX_INSTANCES = 24


@dataclasses.dataclass(frozen=True)
class Pool:
    """The available devices of one kind.

    Attributes:
      hardware: The kind.
      count: Number of devices.
      usd_per_hour: Price of one; None if unknown.
      price_source: The source of the price.
      given_as: The hardware's name, or its file.
    """

    hardware: Hardware
    count: int
    usd_per_hour: float | None
    price_source: str
    given_as: str


# Compared by identity: prices and sources are mappings, and there are thousands.
@dataclasses.dataclass(frozen=True, eq=False)
class Candidate:
    """A deployment without its batch.

    Attributes:
      kind: The kind of arrangement.
      attention: The pool of the devices with the KV cache.
      ffn: The pool of those with the experts; the same one if every device does both.
      topology: Instances of the two roles; None if every device does both.
      parallel: How the FFN side is sharded, or all devices.
    """

    kind: Kind
    attention: Pool
    ffn: Pool
    topology: Topology | None
    parallel: Parallel

    @property
    def num_attention(self) -> int:
        """Devices with a cache."""
        return self.parallel.num_devices if self.topology is None else self.topology.num_attention_devices

    @property
    def num_devices(self) -> int:
        """All devices."""
        return self.parallel.num_devices if self.topology is None else self.topology.num_devices

    @property
    def usd_per_hour(self) -> float | None:
        """Price of all devices; None if a price is missing."""
        own, other = self.attention.usd_per_hour, self.ffn.usd_per_hour
        if own is None or other is None:
            return None
        return self.num_attention * own + (self.num_devices - self.num_attention) * other

    @functools.cached_property
    def machines(self) -> Machines:
        """The input of the arithmetic of time."""
        return Machines.of(self.deploy("fp8", "fp8", 1, 1, 1), self.attention.hardware, self.ffn.hardware)

    @property
    def name(self) -> str:
        """For people, and for files: "2a2f", "ep32", "tp8"."""
        return f"{self.kind}{self.num_devices}" if self.topology is None else self.topology.spec

    @property
    def devices(self) -> str:
        """For people: numbers and kinds of devices."""
        if self.topology is None:
            return f"{self.num_devices} {self.attention.hardware.name}"
        num_ffn = self.topology.num_ffn_devices
        return f"{self.num_attention} {self.attention.hardware.name} + {num_ffn} {self.ffn.hardware.name}"

    def deploy(
        self, weights: str, kv_cache: str, num_microbatches: int, rows: int, context_tokens: int, description: str = ""
    ) -> Deployment:
        """The deployment with a batch.

        Args:
          weights: Format of the weights.
          kv_cache: Format of the pages.
          num_microbatches: Micro-batches in flight; 1 if every device does both.
          rows: Sequences of each device with a cache, in a micro-batch.
          context_tokens: Tokens of each sequence.
          description: One line for people.
        """
        own, other = self.attention.given_as, self.ffn.given_as
        return Deployment(
            name=self.name,
            description=description,
            topology=self.topology,
            num_devices=self.num_devices,
            parallel=self.parallel,
            weights=weights,
            kv_cache=kv_cache,
            num_microbatches=num_microbatches,
            payload="auto",
            hardware=own,
            device_memory_gib=None,
            workload=Workload(rows * num_microbatches * self.num_attention, context_tokens),
            ffn_hardware=None if other == own else other,
        )


def parse_pool(text: str, prices: Prices) -> Pool:
    """Reads HARDWARE:COUNT, such as "h800:32".

    Args:
      text: The given text; the hardware in the form of `load_hardware`.
      prices: Prices per hour.

    Raises:
      ValueError: If it does not have that form, the count is not at least 1, or there is no such hardware.
    """
    name, colon, count = text.rpartition(":")
    if not colon or not count.isdecimal() or int(count) < 1:
        raise ValueError(f"{text!r}: give HARDWARE:COUNT with a count of at least 1, such as h800:32")
    hardware = load_hardware(name)
    return Pool(hardware, int(count), prices.usd_per_hour(hardware), prices.source(hardware), name)


def list_candidates(config: ModelConfig, pools: Sequence[Pool]) -> Iterator[Candidate]:
    """All deployments of a model on the devices of one pool, or of two for the two roles.

    Devices are whole machines, or parts of one. Between machines they need a network. If the FFN side is a machine's
    processor, the attention side is accelerators of that machine.

    Args:
      config: The deployed configuration.
      pools: The available devices.
    """
    ffn_parallels: dict[tuple[int, int], list[Parallel]] = {}
    for pool in pools:
        for parallel in _list_joint(config, pool):
            yield Candidate("tp" if parallel.dp == 1 else "ep", pool, pool, None, parallel)
    for own in pools:
        for other in pools:
            for num_attention, num_ffn, size in _list_instances(own, other):
                if (num_ffn, size) not in ffn_parallels:
                    ffn_parallels[num_ffn, size] = _list_ffn(config, num_ffn, size)
                topology = Topology(f"{num_attention}a{num_ffn}f", num_attention, num_ffn, size)
                for parallel in ffn_parallels[num_ffn, size]:
                    yield Candidate("afd", own, other, topology, parallel)


def _list_joint(config: ModelConfig, pool: Pool) -> Iterator[Parallel]:
    machine = pool.hardware.devices_per_machine
    counts = [size for size in _divisors(machine) if size <= pool.count]
    if pool.hardware.network_gb_s is not None:
        counts += range(2 * machine, min(pool.count, MAX_INSTANCES * machine) + 1, machine)
    for count in counts:
        for tp in _divisors(math.gcd(count, machine)):
            fitting = _list_fitting(config, count, tp, BOTH)
            # Each device then has parts of the width of many experts, which must be within its machine.
            near = [one for one in fitting if one.expert_width_parts <= machine]
            if near:
                yield near[-1]
            if count <= machine and len(near) > 1:
                yield near[0]


def _list_instances(own: Pool, other: Pool) -> Iterator[tuple[int, int, int]]:
    """Attention instances, FFN instances, and devices of each."""
    size_own, size_other = own.hardware.devices_per_machine, other.hardware.devices_per_machine
    if own.hardware.is_host:
        return
    if other.hardware.is_host:
        yield from ((count, 1, 1) for count in range(1, min(size_own, own.count) + 1))
        return
    is_same = own.hardware.name == other.hardware.name
    if is_same:
        for size in _divisors(size_own)[:-1]:
            total = min(size_own, own.count) // size
            # Multiples of smaller deployments are left out.
            pairs = ((x, y) for x in range(1, total) for y in range(1, total - x + 1))
            yield from ((x, y, size) for x, y in pairs if x % 2 or y % 2)
    if own.hardware.network_gb_s is None or other.hardware.network_gb_s is None:
        return
    size = math.gcd(size_own, size_other)
    for x in range(1, min(own.count // size, MAX_INSTANCES) + 1):
        left = own.count // size - x if is_same else other.count // size
        yield from ((x, y, size) for y in range(1, min(left, MAX_INSTANCES) + 1))


def _list_ffn(config: ModelConfig, num_instances: int, size: int) -> list[Parallel]:
    """Experts across instances with their width within one, whole experts on as many devices as possible, or in between."""
    count = num_instances * size
    for tp in reversed(_divisors(size)):
        fitting = _list_fitting(config, count, tp, FFN)
        if fitting:
            over_instances = [one for one in fitting if one.expert_groups <= num_instances]
            return list(dict.fromkeys([*over_instances[-1:], fitting[-1]]))
    return []


def _list_fitting(config: ModelConfig, count: int, tp: int, role: RoleName) -> list[Parallel]:
    """Ways to shard a role's weights, with the experts in more and more groups."""
    groups = _divisors(math.gcd(count, config.text.moe_num_experts)) if config.text.moe_layers else [1]
    ways = [Parallel(count // tp, tp, ep) for ep in groups]
    return [one for one in ways if not find_problems(one, config.text, fp8_block(config), role)]


def _divisors(number: int) -> list[int]:
    return [part for part in range(1, number + 1) if number % part == 0]
