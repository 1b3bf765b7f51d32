"""Seconds of the stages of a step on given devices: their work divided by the devices' rates.

A stage is attention (with projections and head), the FFN, or an exchange between devices, over all layers of one
micro-batch. Work is counted for the device with the most of it: bytes of weights, each read once, bytes of the cache, and
operations. An exchange takes as long as the slowest link on its path, each direction separately.

All functions take the sequences of a device in a micro-batch as an array, so that one call covers all batches.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from step3_jax.config import ModelConfig, TextConfig
from step3_jax.layout.count import (
    ATTENTION_WEIGHTS,
    CORE_ATTENTION,
    DENSE,
    HEAD,
    ROUTED_EXPERTS,
    ROUTERS,
    SHARED_EXPERTS,
    decode_flops,
    weight_bytes,
)
from step3_jax.layout.hardware import Hardware
from step3_jax.layout.page import kv_bytes_per_token
from step3_jax.layout.parallel import Parallel
from step3_jax.layout.payload import PayloadSize, choose_payload
from step3_jax.layout.role import Role
from step3_jax.planner.context import Contexts
from step3_jax.planner.cost import bandwidth_bytes_per_s, peak_flops
from step3_jax.planner.expert_load import ExpertLoad

Numbers = Float[np.ndarray, " N"]
# A kind of work besides those that `layout.count` names.
PROJECTIONS = "projections"
# Bytes of activations that are not quantised to be sent.
_ACTIVATION_BYTES = 2
# All-to-all reserves this many rows for each group of experts, relative to the expected number
# (`layers/expert_exchange.py`).
_CAPACITY_FACTOR = 2.0


class Shares(NamedTuple):
    """The share of the ideal that devices reach, by kind of work; 1 is the ideal itself."""

    attention: float = 1.0
    ffn: float = 1.0
    network: float = 1.0


class Work(NamedTuple):
    """Seconds of one kind of work, and whether memory bandwidth is the bottleneck."""

    seconds: Numbers
    is_memory: Bool[np.ndarray, " N"]


Stage = Mapping[str, Work]


def stage_seconds(stage: Stage) -> Numbers:
    """Seconds of all work of a stage, one kind after the other."""
    return functools.reduce(np.add, (work.seconds for work in stage.values()))


@dataclasses.dataclass(frozen=True)
class Model:
    """A model with its formats and its load.

    Attributes:
      config: As deployed, see `layout.role.deployed_config`.
      weights: "float32", "bfloat16" or "fp8".
      kv_cache: Format of the pages.
      contexts: Contexts of the sequences.
      load: Load of the experts.
    """

    config: ModelConfig
    weights: str
    kv_cache: str
    contexts: Contexts
    load: ExpertLoad

    @property
    def text(self) -> TextConfig:
        """Sizes of the decoder."""
        return self.config.text

    @functools.cached_property
    def kv_bytes(self) -> int:
        """Bytes of cache of one token in all layers."""
        return kv_bytes_per_token(self.text, self.kv_cache)

    @functools.cached_property
    def flops(self) -> Mapping[str, int]:
        """Operations of one token by part; those of core attention are for each token of context."""
        return decode_flops(self.text, 1)

    @functools.cached_property
    def payload(self) -> PayloadSize:
        """What crosses between the roles."""
        return PayloadSize.of(self.text, choose_payload("auto", self.config.dtype))

    @property
    def attention_dtype(self) -> str:
        """The dtype in which scores and values are computed; four-bit numbers are computed in 8 bits."""
        return "fp8" if self.kv_cache in ("fp8", "int4") else "bfloat16"


class Arithmetic:
    """Counts the work of a model on devices, for all batches at once."""

    def __init__(self, model: Model, *, by_chance: bool) -> None:
        """Starts empty.

        Args:
          model: The model.
          by_chance: Whether contexts and experts are drawn at random, so that one device has more than the mean.
        """
        self.model = model
        self.by_chance = by_chance
        self._parts: dict[Role, dict[str, int]] = {}

    def weight_parts(self, role: Role) -> dict[str, int]:
        """Bytes of weights on one device of a role, by part."""
        if role not in self._parts:
            self._parts[role] = weight_bytes(self.model.config, self.model.weights, role)
        return self._parts[role]

    def cached_tokens(self, rows: Numbers, num_devices: int) -> Numbers:
        """Tokens in the cache of the fullest device; `rows` are the sequences of each."""
        if not self.by_chance:
            return rows * self.model.contexts.mean
        return self.model.contexts.count_busiest(rows, num_devices)

    def count_attention(
        self,
        hardware: Hardware,
        role: Role,
        rows: Numbers,
        *,
        read: Numbers,
        attended: Numbers,
        has_head: bool,
        shares: Shares,
    ) -> dict[str, Work]:
        """Attention of one micro-batch in all layers.

        Args:
          hardware: The devices.
          role: The part of the model they hold.
          rows: Tokens of each device.
          read: Cached tokens that a device reads.
          attended: Pairs of a token and one that it attends to.
          has_head: Whether the tokens go through the head.
          shares: Shares of the ideal.
        """
        model, parts = self.model, self.weight_parts(role)
        flops = model.flops
        projections = rows * (flops[ATTENTION_WEIGHTS] + flops.get(ROUTERS, 0))
        work = {
            CORE_ATTENTION: _work(
                read * model.kv_bytes,
                attended * flops[CORE_ATTENTION],
                hardware,
                model.attention_dtype,
                shares.attention,
            ),
            PROJECTIONS: _work(
                parts[ATTENTION_WEIGHTS] + parts["norms and routers"],
                projections,
                hardware,
                model.weights,
                shares.attention,
            ),
        }
        if has_head:
            # As large as the embedding table, of which only a few rows are read; never quantised.
            head_bytes = parts["embedding and head"] / 2
            work[HEAD] = _work(head_bytes, rows * flops[HEAD], hardware, "bfloat16", shares.attention)
        return work

    def count_ffn(self, hardware: Hardware, role: Role, tokens: Numbers, *, shares: Shares) -> dict[str, Work]:
        """The FFN of one micro-batch in all layers.

        Args:
          hardware: The devices.
          role: The part of the model they hold.
          tokens: Tokens of the micro-batch, over all devices.
          shares: Shares of the ideal.
        """
        model, parts, parallel = self.model, self.weight_parts(role), role.parallel
        evenly = tokens / role.num_devices
        work = {
            part: _work(parts[part], evenly * model.flops[part], hardware, model.weights, shares.ffn)
            for part in (DENSE, SHARED_EXPERTS)
            if parts.get(part)
        }
        if parts.get(ROUTED_EXPERTS):
            load, groups = model.load, parallel.expert_groups
            pairs = load.count_busiest(tokens, groups, by_chance=self.by_chance) / parallel.expert_width_parts
            work[ROUTED_EXPERTS] = _work(
                parts[ROUTED_EXPERTS] * load.find_touched(tokens),
                pairs * (model.flops[ROUTED_EXPERTS] / load.top_k),
                hardware,
                model.weights,
                shares.ffn,
            )
        return work

    def count_send(
        self,
        rates: tuple[float, float],
        link_gb_s: float,
        num_instances: int,
        per_instance: int,
        rows: Numbers,
        tokens: Numbers,
        row_bytes: int,
        *,
        share: float,
    ) -> Numbers:
        """Seconds of one direction between attention and FFN on separate devices, in all layers of a micro-batch.

        Each token crosses once for each FFN instance; the devices of an instance receive equal parts of the tokens, and pass
        them to one another over the links of their machine. On the way back the instance's sums take the same path, and the
        attention side adds up those of all instances.

        Args:
          rates: GB/s in each direction of an attention device, and of an FFN device.
          link_gb_s: Bandwidth of each device inside a machine of the FFN side.
          num_instances: FFN instances.
          per_instance: Devices of one instance.
          rows: Tokens of each attention device.
          tokens: Tokens of the micro-batch.
          row_bytes: Bytes of a token.
          share: Share of the ideal.
        """
        across = np.maximum(rows * num_instances / rates[0], tokens / per_instance / rates[1])
        inside = tokens * (per_instance - 1) / per_instance / link_gb_s
        return np.maximum(across, inside) * (row_bytes * self.model.text.num_hidden_layers / 1e9 / share)

    def count_exchange(
        self, hardware: Hardware, parallel: Parallel, rows: Numbers, *, has_head: bool, share: float
    ) -> Numbers:
        """Seconds of all exchanges between devices that do both, in all layers of a micro-batch.

        Layers that are sharded across the devices of a group need the tokens of all of them, and their sums go back: o-proj
        (which takes columns of all instead), dense layers, the shared expert, the head. So do the routed experts inside
        a machine, across all devices. Between machines a token goes to each group of devices that has one of its
        experts, with room for twice the expected tokens, as in `layers/expert_exchange.py`.

        Args:
          hardware: The devices; those of a tensor parallel group are in one machine.
          parallel: How the weights are sharded.
          rows: Tokens of each device.
          has_head: Whether the tokens go through the head.
          share: Of the ideal.

        Raises:
          ValueError: If the devices are in several machines and have no network.
        """
        text, machine, devices, tp = self.model.text, hardware.devices_per_machine, parallel.num_devices, parallel.tp
        num_moe, width, groups = len(text.moe_layers), parallel.expert_width_parts, parallel.expert_groups
        # Everything as numbers that a device receives for each of its own tokens.
        others = text.num_hidden_layers * (text.query_size * (tp - 1) / tp + text.hidden_size * (tp - 1))
        # Routed and shared experts on the same devices have one exchange.
        is_joint = parallel.dp == 1 and devices <= machine
        num_gathers = text.num_hidden_layers - (num_moe if is_joint else 0)
        others += 2 * num_gathers * text.hidden_size * (tp - 1)
        if has_head:
            others += text.hidden_size * (tp - 1) + text.vocab_size * (tp - 1) / tp
        inside, between = float(devices - 1), 0.0
        if devices > machine:
            # Tokens for each group: twice those expected to choose an expert there; at most all.
            room = min(_CAPACITY_FACTOR * (1 - (1 - 1 / groups) ** self.model.load.top_k), 1.0)
            # The devices that share experts have one another's tokens, and each sends them all to its counterparts in
            # other groups.
            inside, between = width - 1 + room * max(machine - width, 0), room * (devices - machine)
        if between and hardware.network_gb_s is None:
            raise ValueError(f"{hardware.name} has no network to other machines: its file has no network_gb_s")
        slowest = max(inside / hardware.link_gb_s, between / (hardware.network_gb_s or 1.0))
        numbers = others / hardware.link_gb_s + 2 * num_moe * text.hidden_size * slowest
        return rows * (numbers * _ACTIVATION_BYTES / 1e9 / share)


def _work(num_bytes: Numbers | float, flops: Numbers, hardware: Hardware, dtype: str, share: float) -> Work:
    by_bytes = num_bytes / bandwidth_bytes_per_s(hardware) + np.zeros_like(flops)
    by_flops = flops / peak_flops(hardware, dtype)
    return Work(np.maximum(by_bytes, by_flops) / share, by_bytes >= by_flops)
