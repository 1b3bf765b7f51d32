"""What runs on which devices: the instances of attention and FFN, and the deployment file.

Pure: reading one needs no device. `configs/afd/` holds the shipped ones.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import get_args

import yaml

from step3_jax import resources
from step3_jax.layout.page import KV_CACHE_DTYPES
from step3_jax.layout.parallel import Parallel, VisionForm
from step3_jax.layout.payload import PAYLOADS
from step3_jax.layout.weight_form import CPU_FORMS, WEIGHTS
from step3_jax.nearest import describe_known

_SPEC = re.compile(r"([1-9][0-9]*)a([1-9][0-9]*)f", re.IGNORECASE)
WITHOUT = "off"
# Where the FFN side may be: on the same kind of devices as attention, or on the CPU devices of the same process.
FFN_DEVICES = ("same", "cpu")
MIN_MICROBATCHES, MAX_MICROBATCHES = 1, 4
DEFAULT_MICROBATCHES = 3
# Longest wait for the other role, in seconds.
DEFAULT_DEADLINE_S = 120.0


@dataclasses.dataclass(frozen=True)
class Topology:
    """Instances of the two roles, attention first.

    Attributes:
      spec: As given, such as "2a1f".
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

    @property
    def num_attention_devices(self) -> int:
        """Devices of the attention side; they come first."""
        return self.num_attention * self.devices_per_instance

    @property
    def num_ffn_devices(self) -> int:
        """Devices of the FFN side."""
        return self.num_ffn * self.devices_per_instance

    def role_of(self, device: int) -> str:
        """Role of a device, by its number among all devices: "attention 0", "ffn 1"."""
        instance = device // self.devices_per_instance
        is_attention = instance < self.num_attention
        return f"attention {instance}" if is_attention else f"ffn {instance - self.num_attention}"


@dataclasses.dataclass(frozen=True)
class Workload:
    """What a deployment must hold.

    Attributes:
      sequences: Sequences at once, in total.
      context_tokens: Tokens of each.
    """

    sequences: int
    context_tokens: int


@dataclasses.dataclass(frozen=True)
class Deployment:
    """One deployment file.

    Attributes:
      name: The file's name, without its suffix.
      description: One line for people.
      topology: The instances; None if every device has both roles.
      num_devices: Total number of devices.
      parallel: For the FFN side with a topology, for all devices without; its ep is known. Attention is data parallel: every
        attention device (every device, without a topology) has its own sequences and KV cache. Its `vision` (the file's
        `mm_encoder_tp_mode`) is for the attention side with a topology: the devices of an instance are a group.
      weights: One of `weight_form.WEIGHTS`; quantised ones keep in bfloat16 what the FP8 release does.
      kv_cache: Format of the KV pages.
      num_microbatches: Micro-batches in flight, 1 to 4.
      payload: What crosses from attention to FFN, one of `PAYLOADS`.
      hardware: Name of a file in `configs/hardware`; None for any.
      device_memory_gib: Memory of a device; None for unlimited.
      workload: What it must hold; None if the file does not say.
      ffn_hardware: Like `hardware`, if the FFN side's devices are of another kind; None for the same.
      ffn_device: "cpu" for an FFN side in the host's memory, on its CPU devices; "same" for the same kind of devices as
        the attention side's.
    """

    name: str
    description: str
    topology: Topology | None
    num_devices: int
    parallel: Parallel
    weights: str
    kv_cache: str
    num_microbatches: int
    payload: str
    hardware: str | None
    device_memory_gib: float | None
    workload: Workload | None
    ffn_hardware: str | None = None
    ffn_device: str = "same"


def parse_topology(spec: str, devices_per_instance: int = 1) -> Topology:
    """Reads "xAyF".

    Args:
      spec: x attention and y FFN instances, such as "2a1f"; upper or lower case.
      devices_per_instance: Devices of each instance.

    Raises:
      ValueError: If the spec does not have that form, or an instance has no devices.
    """
    match = _SPEC.fullmatch(spec.strip())
    if match is None:
        raise ValueError(f"--afd {spec}: give the instances of attention and FFN as xAyF, such as 1a1f or 2a2f")
    if devices_per_instance < 1:
        raise ValueError(f"--afd-devices {devices_per_instance}: an instance of {spec} needs at least 1 device")
    return Topology(spec, int(match[1]), int(match[2]), devices_per_instance)


def default_ffn_parallel(topology: Topology) -> Parallel:
    """How the FFN side is sharded by default: experts across instances, and their widths within one."""
    return Parallel(topology.num_ffn, topology.devices_per_instance, topology.num_ffn)


def read_afd(value: str, devices_per_instance: int | None = None) -> Deployment | None:
    """The deployment for `--afd`.

    Args:
      value: "off", xAyF, or the path of a deployment file that ends in `.yaml`.
      devices_per_instance: For xAyF; 1 if absent. A file has its own.

    Returns:
      The deployment; None for "off".

    Raises:
      ValueError: If it cannot be read, or the file's deployment has no instances.
    """
    if value.lower() == WITHOUT:
        return None
    if not value.endswith((".yaml", ".yml")):
        topology = parse_topology(value, 1 if devices_per_instance is None else devices_per_instance)
        return parse_deployment(value, {"afd": value, "devices_per_instance": topology.devices_per_instance})
    if devices_per_instance is not None:
        raise ValueError(f"--afd-devices is for xAyF: {value} already says how many devices an instance has")
    deployment = load_deployment(value)
    if deployment.topology is None:
        raise ValueError(f"--afd {value}: this deployment has no instances, every device has both roles")
    return deployment


def check_microbatches(num_microbatches: int) -> None:
    """Raises ValueError for an unsupported number of micro-batches."""
    if not MIN_MICROBATCHES <= num_microbatches <= MAX_MICROBATCHES:
        raise ValueError(
            f"{num_microbatches} micro-batches; allowed: {MIN_MICROBATCHES} to {MAX_MICROBATCHES} "
            f"(3 fill a pipeline of attention, exchange and FFN)"
        )


def find_deployment(name: str | pathlib.Path) -> pathlib.Path:
    """The file of a deployment, given its path or the name of a shipped one, such as "2a2f".

    Raises:
      ValueError: If there is neither; the message lists the shipped ones.
    """
    path = pathlib.Path(name).expanduser()
    if path.is_file():
        return path
    shipped = {file.stem: file for file in sorted(resources.find("configs/afd").glob("*.yaml"))}
    if str(name) in shipped:
        return shipped[str(name)]
    raise ValueError(
        f"no deployment {name}: give the path of a YAML file, or a name{describe_known(str(name), shipped)}"
    )


def load_deployment(name: str | pathlib.Path) -> Deployment:
    """Reads a deployment file.

    Args:
      name: As for `find_deployment`.

    Raises:
      ValueError: If there is no such file, or it has an impossible value; the message names file and key.
    """
    path = find_deployment(name)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, Mapping):
        raise ValueError(f"{path} holds {type(values).__name__}; a mapping with the key 'afd' is needed")
    try:
        return parse_deployment(path.stem, values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse_deployment(name: str, values: Mapping[str, object]) -> Deployment:
    """Reads a deployment from the mapping that its file holds.

    `configs/afd/2a2f.yaml` and `configs/afd/16gpu-bf16-80gb.yaml` have all keys.

    Raises:
      ValueError: For an unknown key or value, or inconsistent numbers.
    """
    _check_keys(
        values,
        "",
        (
            "description",
            "afd",
            "devices",
            "devices_per_instance",
            "parallel",
            "ffn",
            "mm_encoder_tp_mode",
            "weights",
            "kv_cache",
            "microbatches",
            "payload",
            "hardware",
            "ffn_hardware",
            "ffn_device",
            "device_memory_gib",
            "workload",
        ),
    )
    afd = values.get("afd")
    # YAML reads a bare `off` as false.
    is_fused = afd is False or (isinstance(afd, str) and afd.lower() == WITHOUT)
    if not is_fused and not isinstance(afd, str):
        raise ValueError(f"afd is {afd!r}; give xAyF such as 2a2f, or off")
    if is_fused:
        _check_absent(
            values,
            ("devices_per_instance", "ffn", "ffn_hardware", "ffn_device", "microbatches", "payload"),
            "with afd: off it has no effect",
        )
        topology, num_devices = None, _whole(values, "devices", 1)
        parallel = _parallel(values, "parallel", num_devices, Parallel(dp=num_devices, ep=num_devices))
    else:
        _check_absent(values, ("devices",), "afd and devices_per_instance give the number")
        _check_absent(values, ("parallel",), "attention is data parallel, and ffn says how the FFN side is sharded")
        topology = parse_topology(str(afd), _whole(values, "devices_per_instance", 1))
        num_devices = topology.num_devices
        default = default_ffn_parallel(topology)
        parallel = _parallel(values, "ffn", topology.num_ffn_devices, default)
    weights = _choice(values, "weights", WEIGHTS, "bfloat16")
    if topology is not None and weights in CPU_FORMS:
        allowed = ", ".join(one for one in WEIGHTS if one not in CPU_FORMS)
        raise ValueError(f"weights is {weights!r}; allowed: {allowed} with afd, as {weights} is only for CPUs")
    vision = _choice(values, "mm_encoder_tp_mode", get_args(VisionForm), parallel.vision)
    parallel = dataclasses.replace(parallel, vision=vision)  # type: ignore[arg-type]
    num_microbatches = _whole(values, "microbatches", DEFAULT_MICROBATCHES)
    check_microbatches(num_microbatches)
    return Deployment(
        name=name,
        description=_text(values, "description") or "",
        topology=topology,
        num_devices=num_devices,
        parallel=parallel,
        weights=weights,
        kv_cache=_choice(values, "kv_cache", KV_CACHE_DTYPES, "bfloat16"),
        num_microbatches=num_microbatches,
        payload=_choice(values, "payload", PAYLOADS, "auto"),
        hardware=_text(values, "hardware"),
        device_memory_gib=_positive(values, "device_memory_gib"),
        workload=_workload(values),
        ffn_hardware=_text(values, "ffn_hardware"),
        ffn_device=_choice(values, "ffn_device", FFN_DEVICES, "same"),
    )


def format_deployment(deployment: Deployment) -> str:
    """The text of a deployment file; `parse_deployment` reads the same deployment from it."""
    topology, parallel = deployment.topology, deployment.parallel
    shards: dict[str, object] = {"dp": parallel.dp, "tp": parallel.tp, "ep": parallel.expert_groups}
    values: dict[str, object] = {"description": deployment.description}
    if topology is None:
        values |= {"afd": WITHOUT, "devices": deployment.num_devices, "parallel": shards}
    else:
        values |= {"afd": topology.spec, "devices_per_instance": topology.devices_per_instance, "ffn": shards}
    if deployment.parallel.vision != Parallel().vision:
        values["mm_encoder_tp_mode"] = deployment.parallel.vision
    values |= {"weights": deployment.weights, "kv_cache": deployment.kv_cache}
    if topology is not None:
        values |= {"microbatches": deployment.num_microbatches, "payload": deployment.payload}
    values |= {
        "hardware": deployment.hardware,
        "ffn_hardware": deployment.ffn_hardware,
        "ffn_device": None if deployment.ffn_device == "same" else deployment.ffn_device,
        "device_memory_gib": deployment.device_memory_gib,
        "workload": None if deployment.workload is None else dataclasses.asdict(deployment.workload),
    }
    given = {key: value for key, value in values.items() if value is not None and value != ""}
    return yaml.safe_dump(given, sort_keys=False, width=120)


def _check_keys(values: Mapping[str, object], prefix: str, allowed: tuple[str, ...]) -> None:
    for key in values:
        if key not in allowed:
            raise ValueError(f"unknown key {prefix}{key}{describe_known(str(key), allowed)}")


def _check_absent(values: Mapping[str, object], keys: tuple[str, ...], reason: str) -> None:
    for key in keys:
        if key in values:
            raise ValueError(f"{key} is not allowed here: {reason}")


def _whole(values: Mapping[str, object], key: str, default: int, prefix: str = "") -> int:
    value = values.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{prefix}{key} is {value!r}; a whole number of at least 1 is needed")
    return value


def _positive(values: Mapping[str, object], key: str) -> float | None:
    value = values.get(key)
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise ValueError(f"{key} is {value!r}; a number above 0 is needed")
    return float(value)


def _text(values: Mapping[str, object], key: str) -> str | None:
    value = values.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{key} is {value!r}; a text is needed")
    return value


def _choice(values: Mapping[str, object], key: str, allowed: tuple[str, ...], default: str) -> str:
    value = values.get(key, default)
    if value not in allowed:
        raise ValueError(f"{key} is {value!r}; allowed: {', '.join(allowed)}")
    return str(value)


def _section(values: Mapping[str, object], key: str, allowed: tuple[str, ...]) -> Mapping[str, object] | None:
    section = values.get(key)
    if section is None:
        return None
    if not isinstance(section, Mapping):
        raise ValueError(f"{key} is {section!r}; a mapping with {', '.join(allowed)} is needed")
    _check_keys(section, f"{key}.", allowed)
    return section


def _parallel(values: Mapping[str, object], key: str, num_devices: int, default: Parallel) -> Parallel:
    section = _section(values, key, ("dp", "tp", "ep"))
    if section is None:
        return default
    tp = _whole(section, "tp", 1, f"{key}.")
    parallel = Parallel(
        _whole(section, "dp", max(num_devices // tp, 1), f"{key}."), tp, _whole(section, "ep", 1, f"{key}.")
    )
    if parallel.num_devices != num_devices or num_devices % (parallel.ep or 1):
        raise ValueError(
            f"{key} is {parallel}, for {num_devices} device(s): dp x tp must be {num_devices}, and ep a divisor of it"
        )
    return parallel


def _workload(values: Mapping[str, object]) -> Workload | None:
    section = _section(values, "workload", ("sequences", "context_tokens"))
    if section is None:
        return None
    return Workload(_whole(section, "sequences", 1, "workload."), _whole(section, "context_tokens", 1, "workload."))
