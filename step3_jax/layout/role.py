"""The roles of a deployment, and the configuration that it runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from step3_jax.config import ModelConfig, QuantConfig
from step3_jax.layout.deployment import Deployment, Topology
from step3_jax.layout.hardware import load_hardware
from step3_jax.layout.parallel import ATTENTION, BOTH, FFN, Parallel, RoleName, VisionForm, fit_parallel


@dataclasses.dataclass(frozen=True)
class Role:
    """Devices that hold the same part of the model.

    Attributes:
      name: `BOTH`, `ATTENTION` or `FFN`.
      num_devices: How many.
      parallel: How the weights of their role are spread over them; its ep is known.
      tower: How vision tower and projector are spread; None for like everything else.
    """

    name: RoleName
    num_devices: int
    parallel: Parallel
    tower: Parallel | None = None

    @property
    def has_cache(self) -> bool:
        """Whether sequences and their KV cache are here."""
        return self.name != FFN

    def holds(self, path: Sequence[str | int]) -> bool:
        """Whether the parameter at `path` of a `Step3` is here."""
        return self.name == BOTH or is_ffn(path) == (self.name == FFN)

    def parallel_of(self, path: Sequence[str | int]) -> Parallel:
        """How the parameter at `path` is spread over them."""
        return self.tower if self.tower is not None and is_tower(path) else self.parallel

    @property
    def num_tower_shards(self) -> int:
        """Devices that vision tower and projector are sharded across."""
        parallel = self.tower or self.parallel
        return parallel.tp if parallel.vision == "weights" else 1


def is_ffn(path: Sequence[str | int]) -> bool:
    """Whether a parameter of `Step3` belongs to the FFN role; all others belong to attention."""
    return "ffn" in path


def is_tower(path: Sequence[str | int]) -> bool:
    """Whether a parameter of `Step3` belongs to the vision tower or to the projector."""
    return path[0] in ("vision", "projector")


def is_on_cpu(deployment: Deployment, name: RoleName) -> bool:
    """Whether a role's devices are the processors of a machine; of hardware that the deployment does not name, no.

    Args:
      deployment: What runs where.
      name: The role.
    """
    if name == FFN and deployment.ffn_device == "cpu":
        return True
    hardware = (deployment.ffn_hardware if name == FFN else None) or deployment.hardware
    return hardware is not None and load_hardware(hardware).is_host


def roles_of(deployment: Deployment) -> list[Role]:
    """The roles of a deployment."""
    topology = deployment.topology
    if topology is None:
        return [Role(BOTH, deployment.num_devices, deployment.parallel)]
    return [
        attention_role(topology, deployment.parallel.vision),
        Role(FFN, topology.num_ffn_devices, deployment.parallel),
    ]


def attention_role(topology: Topology, vision: VisionForm) -> Role:
    """The attention side, which is data parallel.

    Args:
      topology: The instances.
      vision: "weights": vision tower and projector are sharded across the devices of an instance. "data": each has a copy.
    """
    count = topology.num_attention_devices
    tower = Parallel(topology.num_attention, topology.devices_per_instance, 1, vision=vision)
    return Role(ATTENTION, count, Parallel(dp=count, ep=1), tower)


def deployed_config(config: ModelConfig, weights: str, *, text_only: bool = False) -> ModelConfig:
    """The configuration as a deployment runs it.

    Args:
      config: The model's configuration; whether its release is quantised does not matter.
      weights: One of `weight_form.WEIGHTS`.
      text_only: Whether vision tower and projector are left out.
    """
    quantization = (config.quantization or QuantConfig()) if weights == "fp8" else None
    return dataclasses.replace(
        config,
        dtype="float32" if weights == "float32" else "bfloat16",
        quantization=quantization,
        vision=None if text_only else config.vision,
    )


def fp8_block(config: ModelConfig) -> tuple[int, int] | None:
    """Rows and columns that share a scale where weights are in FP8; None where they are not."""
    return None if config.quantization is None else config.quantization.weight_block_size


def check_deployment(config: ModelConfig, deployment: Deployment) -> Parallel:
    """How the weights are sharded: over all devices, or over those of the FFN side.

    Args:
      config: From `deployed_config`.
      deployment: What runs where.

    Raises:
      ValueError: If that does not divide the model; the message says what would.
    """
    role = roles_of(deployment)[-1]
    return fit_parallel(role.parallel, config.text, fp8_block=fp8_block(config), role=role.name)
