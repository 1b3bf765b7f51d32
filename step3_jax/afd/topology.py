"""Which devices are attention, which are FFN, and where each weight is placed: only where its role needs it.

Attention devices are data parallel: each has all attention weights, and sequences of its own with their KV cache, as
one key/value head cannot be sharded; the vision tower is sharded across the devices of an instance. The FFN is sharded
across the FFN devices in any way that `Parallel` allows: tensor parallel, expert parallel, or both. Each token goes to
one FFN device, and the FFN side's own collectives take it from there to the devices that have a part of its experts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from step3_jax.checkpoint.names import parameters_of
from step3_jax.config import ModelConfig
from step3_jax.distributed import too_few_cpu_devices
from step3_jax.layout.deployment import Topology, default_ffn_parallel
from step3_jax.layout.parallel import FFN, Parallel, find_problems, list_parallels
from step3_jax.layout.role import Role, attention_role, fp8_block, is_ffn, is_tower
from step3_jax.layout.tensor import Path
from step3_jax.mesh import Layout, find_cpu_devices, find_devices, make_layout
from step3_jax.model.step3 import abstract_step3

# The axis of the mesh of all devices.
UNION = "union"


@dataclasses.dataclass(frozen=True)
class AfdTopology:
    """Devices of a deployment.

    Attributes:
      instances: xAyF.
      parallel: How the weights of the FFN side are sharded, and whether the vision tower is; its ep is known.
      devices: All of them, attention first.
    """

    instances: Topology
    parallel: Parallel
    devices: tuple[jax.Device, ...]

    @classmethod
    def of(
        cls,
        instances: Topology,
        parallel: Parallel | None = None,
        devices: Sequence[jax.Device] | None = None,
        ffn_device: str = "same",
    ) -> AfdTopology:
        """Takes the first available devices.

        Args:
          instances: xAyF.
          parallel: How the FFN side is sharded; if absent, experts across instances, and their widths within one.
          devices: To choose from; all devices of the default platform if absent (see `mesh.find_devices`).
          ffn_device: "cpu" for an FFN side on this process's CPU devices, whatever the attention side runs on.

        Raises:
          ValueError: If there are too few devices (the message says what would fit), or `parallel` is for another
            number of FFN devices.
        """
        devices = find_devices(instances.num_devices) if devices is None else devices
        if ffn_device == "cpu" and devices[0].platform != "cpu":
            devices = [*devices[: instances.num_attention_devices], *find_cpu_devices(instances.num_ffn_devices)]
        if len(devices) < instances.num_devices:
            raise ValueError(
                f"--afd {instances.spec} with {instances.devices_per_instance} device(s) an instance needs "
                f"{instances.num_devices} devices, and there are {len(devices)} ({devices[0].platform}): "
                + _what_fits(instances, len(devices), devices[0].platform)
            )
        parallel = default_ffn_parallel(instances) if parallel is None else parallel
        num_ffn = instances.num_ffn_devices
        if parallel.num_devices != num_ffn or parallel.ep is None or num_ffn % parallel.ep:
            raise ValueError(
                f"the FFN side of {instances.spec} has {num_ffn} device(s), and dp {parallel.dp} x tp {parallel.tp}, ep "
                f"{parallel.ep} is given: dp x tp must be {num_ffn}, and ep a divisor of it"
            )
        return cls(instances, parallel, tuple(devices[: instances.num_devices]))

    @property
    def num_attention(self) -> int:
        """Attention devices, each with its own sequences and pages."""
        return self.instances.num_attention_devices

    @property
    def num_ffn(self) -> int:
        """FFN devices."""
        return self.instances.num_ffn_devices

    @property
    def ffn_platform(self) -> str:
        """The platform of the FFN devices; the attention devices may have another."""
        return self.devices[self.num_attention].platform

    @property
    def is_mixed(self) -> bool:
        """Whether the two sides are on different platforms."""
        return self.devices[0].platform != self.ffn_platform

    @property
    def num_pieces(self) -> int:
        """Equal pieces that a micro-batch is cut into: each device of either role has a whole number of them."""
        return math.lcm(self.num_attention, self.num_ffn)

    @property
    def attention_role(self) -> Role:
        """The part of the model that attention devices hold."""
        return attention_role(self.instances, self.parallel.vision)

    @functools.cached_property
    def attention(self) -> Layout:
        """The attention devices."""
        return make_layout(self.attention_role.parallel, self.devices[: self.num_attention])

    @functools.cached_property
    def tower(self) -> Layout:
        """The attention devices as vision tower and projector are placed on them."""
        role = self.attention_role
        return make_layout(role.tower or role.parallel, self.devices[: self.num_attention])

    @functools.cached_property
    def ffn(self) -> Layout:
        """The FFN devices."""
        return make_layout(self.parallel, self.devices[self.num_attention :])

    @functools.cached_property
    def union(self) -> Mesh:
        """All devices in a row, attention first; its axis is `UNION`."""
        return Mesh(np.array(self.devices), (UNION,))

    def check(self, config: ModelConfig) -> None:
        """Refuses a model that does not divide over the FFN side.

        Raises:
          ValueError: If it does not; the message gives settings for as many devices that would fit.
        """
        block = fp8_block(config)
        problems = find_problems(self.parallel, config.text, block, FFN)
        if problems:
            choices = list_parallels(self.num_ffn)
            fitting = [one for one in choices if not find_problems(one, config.text, block, FFN)]
            hint = " or ".join(f"tp {one.tp} ep {one.ep}" for one in fitting)
            hint = f"give {hint}" if fitting else f"no setting for {self.num_ffn} device(s) does"
            raise ValueError(
                f"the FFN side's tp {self.parallel.tp}, ep {self.parallel.ep} on {self.num_ffn} device(s) does not divide "
                f"the model: {'; '.join(problems)}; {hint}"
            )

    def parameter(self, path: Path) -> NamedSharding:
        """The placement of the parameter at `path` of a `Step3`."""
        if is_ffn(path):
            return self.ffn.parameter(path)
        return (self.tower if is_tower(path) else self.attention).parameter(path)

    def shardings(self, config: ModelConfig) -> dict[Path, NamedSharding]:
        """The placement of each parameter of `Step3(config)`, for `checkpoint.load_model`.

        Raises:
          ValueError: As `check`.
        """
        self.check(config)
        model = abstract_step3(config)
        return {path: self.parameter(path) for path in parameters_of(model)}


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
