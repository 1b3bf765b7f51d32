"""How long a decode step takes, from the seconds of its stages, and which one is the bottleneck."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Self

import numpy as np

from step3_jax.layout.count import CORE_ATTENTION
from step3_jax.layout.deployment import Deployment
from step3_jax.layout.hardware import Hardware
from step3_jax.layout.parallel import ATTENTION, BOTH, FFN
from step3_jax.layout.role import Role, roles_of
from step3_jax.planner.stage import Arithmetic, Numbers, Shares, Stage, stage_seconds

# Names of a step's possible bottlenecks, besides those of the work in a stage.
SEND, BACK, ROUND_TRIP, EXCHANGE = "network to the FFN side", "network back", "round trip", "exchange between devices"


@dataclasses.dataclass(frozen=True)
class Machines:
    """Devices of one deployment and how the model is spread over them.

    Attributes:
      attention: Hardware of the devices with the KV cache.
      ffn: Hardware of those with the experts; the same ones if every device does both.
      attention_role: The part of the model on the former.
      ffn_role: The part on the latter.
      num_instances: FFN instances; 0 if every device does both.
    """

    attention: Hardware
    ffn: Hardware
    attention_role: Role
    ffn_role: Role
    num_instances: int

    @classmethod
    def of(cls, deployment: Deployment, attention: Hardware, ffn: Hardware) -> Self:
        """The devices of a deployment.

        Args:
          deployment: What runs where.
          attention: Its hardware.
          ffn: The FFN side's hardware.
        """
        roles, topology = roles_of(deployment), deployment.topology
        return cls(attention, ffn, roles[0], roles[-1], 0 if topology is None else topology.num_ffn)

    @property
    def is_apart(self) -> bool:
        """Whether attention and FFN are on separate devices."""
        return self.num_instances > 0

    @property
    def num_attention(self) -> int:
        """Devices with the cache."""
        return self.attention_role.num_devices

    @property
    def num_devices(self) -> int:
        """All devices."""
        return self.num_attention + (self.ffn_role.num_devices if self.is_apart else 0)

    @property
    def rates(self) -> tuple[float, float]:
        """GB/s in each direction between the two sides, for an attention device and for an FFN device.

        Raises:
          ValueError: If devices in several machines have no network.
        """
        if self.ffn.is_host:
            # Each accelerator has its own lanes to the processor.
            return self.ffn.link_gb_s, self.ffn.link_gb_s * self.num_attention
        if self.attention.name == self.ffn.name and self.num_devices <= self.attention.devices_per_machine:
            return self.attention.link_gb_s, self.ffn.link_gb_s
        for one in (self.attention, self.ffn):
            if one.network_gb_s is None:
                raise ValueError(f"{one.name} has no network to other machines: its file has no network_gb_s")
        return self.attention.network_gb_s or 0.0, self.ffn.network_gb_s or 0.0


@dataclasses.dataclass(frozen=True)
class Stages:
    """The stages of one micro-batch over all layers, for all requested batches.

    Attributes:
      is_apart: Whether attention and FFN are on separate devices.
      attention: Work of the attention side.
      ffn: Work of the FFN side.
      send: Seconds to the FFN side; for devices that do both, those of all exchanges.
      back: Seconds of the way back; zeros for devices that do both.
      shares: The shares of the ideal that are reached.
    """

    is_apart: bool
    attention: Stage
    ffn: Stage
    send: Numbers
    back: Numbers
    shares: Shares

    def find_busy(self, num_microbatches: int) -> dict[str, Numbers]:
        """Seconds of a step that each resource needs; the largest is the step's time.

        With attention and FFN on separate devices these are the cycles of a pipeline without jitter: each side and each
        direction of the network serves all micro-batches, and a micro-batch goes round once per layer. With devices that do
        both, published shares include the exchanges as far as they were hidden; no step is shorter than its ideal work plus
        the exchanges, since nothing here hides them.

        Args:
          num_microbatches: 1 for devices that do both.
        """
        attention, ffn = stage_seconds(self.attention), stage_seconds(self.ffn)
        if self.is_apart:
            return {
                ATTENTION: num_microbatches * attention,
                FFN: num_microbatches * ffn,
                SEND: num_microbatches * self.send,
                BACK: num_microbatches * self.back,
                ROUND_TRIP: attention + ffn + self.send + self.back,
            }
        compute = attention + ffn
        if self.shares == Shares():
            return {BOTH: compute, EXCHANGE: self.send}
        return {BOTH: compute, EXCHANGE: attention * self.shares.attention + ffn * self.shares.ffn + self.send}

    def step_seconds(self, num_microbatches: int) -> Numbers:
        """Seconds of all micro-batches."""
        return np.maximum.reduce(list(self.find_busy(num_microbatches).values()))

    def find_binding(self, num_microbatches: int, index: int) -> str:
        """The bottleneck of one batch's step, in words.

        Args:
          num_microbatches: As for `find_busy`.
          index: Index of the batch.
        """
        busy = {name: float(seconds[index]) for name, seconds in self.find_busy(num_microbatches).items()}
        name = max(busy, key=busy.__getitem__)
        if name in (SEND, BACK, EXCHANGE):
            return name
        if name == ROUND_TRIP:
            return f"round trip of a micro-batch ({num_microbatches} in flight)"
        stages: Mapping[str, Stage] = {ATTENTION: self.attention, FFN: self.ffn}
        if name != BOTH:
            stages = {name: stages[name]}
        kinds = [
            (float(work.seconds[index]), kind, bool(work.is_memory[index]))
            for stage in stages.values()
            for kind, work in stage.items()
        ]
        _, kind, is_memory = max(kinds)
        read = "the KV cache" if kind == CORE_ATTENTION else f"the weights of {kind}"
        side = "" if name == BOTH else f"{'attention' if name == ATTENTION else 'FFN'} side: "
        return f"{side}{f'reading {read}' if is_memory else f'arithmetic of {kind}'}"


def count_decode(arithmetic: Arithmetic, machines: Machines, rows: Numbers, shares: Shares) -> Stages:
    """The stages of decoding one token of each sequence.

    Args:
      arithmetic: The model's arithmetic.
      machines: The devices.
      rows: Sequences of each device with a cache, in a micro-batch.
      shares: Shares of the ideal.

    Raises:
      ValueError: If devices in several machines have no network.
    """
    cached = arithmetic.cached_tokens(rows, machines.num_attention)
    return _count(arithmetic, machines, rows, cached, cached, has_head=True, shares=shares)


def count_prefill(
    arithmetic: Arithmetic, machines: Machines, tokens: float, prompt_tokens: float, shares: Shares
) -> Stages:
    """The stages of prefilling a part of a prompt on every device with a cache, halfway through the prompt.

    Args:
      arithmetic: The model's arithmetic.
      machines: The devices.
      tokens: Tokens of each device in a micro-batch.
      prompt_tokens: Tokens of the whole prompt.
      shares: Shares of the ideal.

    Raises:
      ValueError: If devices in several machines have no network.
    """
    rows, before = np.array([tokens]), np.array([prompt_tokens / 2])
    return _count(arithmetic, machines, rows, before, rows * before, has_head=False, shares=shares)


def _count(
    arithmetic: Arithmetic,
    machines: Machines,
    rows: Numbers,
    read: Numbers,
    attended: Numbers,
    *,
    has_head: bool,
    shares: Shares,
) -> Stages:
    tokens = rows * machines.num_attention
    attention = arithmetic.count_attention(
        machines.attention,
        machines.attention_role,
        rows,
        read=read,
        attended=attended,
        has_head=has_head,
        shares=shares,
    )
    ffn = arithmetic.count_ffn(machines.ffn, machines.ffn_role, tokens, shares=shares)
    if machines.is_apart:
        payload = arithmetic.model.payload
        send, back = (
            arithmetic.count_send(
                machines.rates,
                machines.ffn.link_gb_s,
                machines.num_instances,
                machines.ffn_role.num_devices // machines.num_instances,
                rows,
                tokens,
                row_bytes,
                share=shares.network,
            )
            for row_bytes in (payload.row_bytes, payload.output_bytes)
        )
        return Stages(True, attention, ffn, send, back, shares)
    parallel = machines.ffn_role.parallel
    exchange = arithmetic.count_exchange(machines.attention, parallel, rows, has_head=has_head, share=shares.network)
    return Stages(False, attention, ffn, exchange, np.zeros_like(rows), shares)
