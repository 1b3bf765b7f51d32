"""Which devices are attention, which are FFN, and where each weight lives: nowhere but where its role needs it.

Attention devices are data parallel: each has all attention weights, and sequences of its own with their KV cache, as one
key/value head cannot be divided; the devices of an instance share out the vision tower. FFN devices share out the FFN in
any way that `sharding.Parallel` knows: tensor parallel, expert parallel, or both. Each token goes to one FFN device, and
the FFN side's own collectives take it from there to whoever has a part of its experts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from step3_jax.checkpoint.names import Path, parameters_of
from step3_jax.config import ModelConfig
from step3_jax.deployment import Division, Topology
from step3_jax.mesh import Layout, find_devices, make_layout, too_few_cpu_devices
from step3_jax.model.step3 import abstract_step3
from step3_jax.sharding import Parallel, VisionForm, find_problems

# The axis of the mesh of all devices.
UNION = "union"


@dataclasses.dataclass(frozen=True)
class AfdTopology:
    """Devices of a deployment.

    Attributes:
      instances: xAyF.
      division: How the FFN side shares out its weights.
      devices: All of them, attention first.
      vision: "weights" or "data", as in `sharding.Parallel`; here the devices of an attention instance are the group.
    """

    instances: Topology
    division: Division
    devices: tuple[jax.Device, ...]
    vision: VisionForm = "weights"

    @classmethod
    def of(
        cls,
        instances: Topology,
        division: Division | None = None,
        devices: Sequence[jax.Device] | None = None,
        *,
        vision: VisionForm = "weights",
    ) -> AfdTopology:
        """Takes the first devices there are.

        Args:
          instances: xAyF.
          division: Of the FFN side; if absent, experts are shared out over instances and widths inside one.
          devices: To choose from; all devices of the default platform if absent (see `mesh.find_devices`).
          vision: Whether the devices of an attention instance share out the vision tower, or have a copy each.

        Raises:
          ValueError: If there are too few devices (the message says what would fit), or `division` is of another number
            of FFN devices.
        """
        devices = find_devices(instances.num_devices) if devices is None else devices
        if len(devices) < instances.num_devices:
            raise ValueError(
                f"--afd {instances.spec} with {instances.devices_per_instance} device(s) an instance needs "
                f"{instances.num_devices} devices, and there are {len(devices)} ({devices[0].platform}): "
                + _what_fits(instances, len(devices), devices[0].platform)
            )
        if division is None:
            division = Division(instances.num_ffn, instances.devices_per_instance, instances.num_ffn)
        num_ffn = instances.num_ffn_devices
        if division.dp * division.tp != num_ffn or num_ffn % division.ep:
            raise ValueError(
                f"the FFN side of {instances.spec} has {num_ffn} device(s), and dp {division.dp} x tp {division.tp}, ep "
                f"{division.ep} is given: dp x tp must be {num_ffn}, and ep a divisor of it"
            )
        return cls(instances, division, tuple(devices[: instances.num_devices]), vision)

    @property
    def num_attention(self) -> int:
        """Attention devices, each with its own sequences and pages."""
        return self.instances.num_attention_devices

    @property
    def num_ffn(self) -> int:
        """FFN devices."""
        return self.instances.num_ffn_devices

    @property
    def num_pieces(self) -> int:
        """Equal pieces that a micro-batch is cut in on its way: each device of either role has a whole number of them."""
        return math.lcm(self.num_attention, self.num_ffn)

    @functools.cached_property
    def attention(self) -> Layout:
        """The attention devices."""
        return make_layout(Parallel(dp=self.num_attention, ep=1), self.devices[: self.num_attention])

    @functools.cached_property
    def tower(self) -> Layout:
        """The attention devices as vision tower and projector lie on them."""
        instances = self.instances
        parallel = Parallel(instances.num_attention, instances.devices_per_instance, 1, vision=self.vision)
        return make_layout(parallel, self.devices[: self.num_attention])

    @functools.cached_property
    def ffn(self) -> Layout:
        """The FFN devices."""
        division = self.division
        return make_layout(Parallel(division.dp, division.tp, division.ep), self.devices[self.num_attention :])

    @functools.cached_property
    def union(self) -> Mesh:
        """All devices in a row, attention first; its axis is `UNION`."""
        return Mesh(np.array(self.devices), (UNION,))

    def check(self, config: ModelConfig) -> None:
        """Refuses a model that the FFN side cannot share out.

        Raises:
          ValueError: That, with the divisions of as many devices that would serve.
        """
        problems = _problems(config, self.division)
        if problems:
            fitting = [division for division in _divisions(self.num_ffn) if not _problems(config, division)]
            hint = " or ".join(f"tp {one.tp} ep {one.ep}" for one in fitting)
            hint = f"give {hint}" if fitting else f"no other of {self.num_ffn} device(s) does"
            raise ValueError(
                f"the FFN side's tp {self.division.tp}, ep {self.division.ep} on {self.num_ffn} device(s) does not divide "
                f"the model: {'; '.join(problems)}; {hint}"
            )

    def parameter(self, path: Path) -> NamedSharding:
        """Where the parameter at `path` of a `Step3` lies."""
        if is_ffn(path):
            return self.ffn.parameter(path)
        return (self.tower if is_tower(path) else self.attention).parameter(path)

    def shardings(self, config: ModelConfig) -> dict[Path, NamedSharding]:
        """Where each parameter of `Step3(config)` lies, for `checkpoint.load_model`.

        Raises:
          ValueError: As `check`.
        """
        self.check(config)
        model = abstract_step3(config)
        return {path: self.parameter(path) for path in parameters_of(model)}


def is_ffn(path: Path) -> bool:
    """Whether a parameter of `Step3` belongs to the FFN role; all others belong to attention."""
    return "ffn" in path


def is_tower(path: Path) -> bool:
    """Whether a parameter of `Step3` belongs to the vision tower or to the projector."""
    return path[0] in ("vision", "projector")


def _problems(config: ModelConfig, division: Division) -> list[str]:
    block = None if config.quantization is None else config.quantization.weight_block_size
    text, tp = config.text, division.tp
    # Of what `find_problems` looks at, the FFN side cuts neither heads nor the model's width: it has no embedding.
    unlimited = dataclasses.replace(
        text, num_attention_heads=text.num_attention_heads * tp * max(block or (1,)), hidden_size=text.hidden_size * tp
    )
    return find_problems(Parallel(division.dp, tp, division.ep), unlimited, block)


def _divisions(num_devices: int) -> list[Division]:
    divisors = [part for part in range(1, num_devices + 1) if num_devices % part == 0]
    return [Division(num_devices // tp, tp, ep) for tp in divisors for ep in divisors]


def _what_fits(instances: Topology, num_devices: int, platform: str) -> str:
    num_instances = instances.num_attention + instances.num_ffn
    if num_devices >= num_instances:
        hint = f"it fits with --afd-devices {num_devices // num_instances}"
    elif num_devices < 2:
        hint = "leave out --afd"
    else:
        num_ffn = max(1, min(instances.num_ffn, num_devices // 2))
        hint = f"{num_devices - num_ffn}a{num_ffn}f fits with --afd-devices 1"
    if platform == "cpu":
        return f"{hint}. For more on a CPU: {too_few_cpu_devices(instances.num_devices)}"
    return hint if num_devices > 1 else f"{hint}, or set JAX_PLATFORMS=cpu to try it on one machine"
