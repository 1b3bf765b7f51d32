"""The table of devices: `configs/hardware/`, one file each, with the source of each figure."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping

import yaml

from step3_jax import resources
from step3_jax.nearest import describe_known

_NUMBERS = ("memory_gib", "bandwidth_tb_s", "bf16_tflops", "link_gb_s")
_OPTIONAL_NUMBERS = ("fp8_tflops", "int8_tops", "network_gb_s", "usd_per_hour")
_OTHERS = ("description", "platform", "devices_per_machine", "sources")
PLATFORMS = ("gpu", "cpu")


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One device.

    Attributes:
      name: The file's name, without its suffix.
      description: One line for people.
      memory_gib: Memory as the driver reports it, in GiB.
      bandwidth_tb_s: Memory bandwidth, in TB/s.
      bf16_tflops: Peak of dense BF16 products, in 1e12 operations per second; of processors, that of the products that
        the CPU kernels compute, which are in float32.
      fp8_tflops: The same for FP8; None if the device has no FP8 products.
      link_gb_s: Bandwidth to the other devices of its machine, in GB/s in each direction.
      int8_tops: Peak of dense INT8 products, in 1e12 operations per second; None if it has none, or it is not known.
      network_gb_s: Bandwidth to other machines over one device's network interfaces, in GB/s in each direction; None if
        it is not known.
      devices_per_machine: Devices that the links connect.
      usd_per_hour: Price of one device; None if no source has one.
      sources: The source of each figure, in words, by the figure's name here.
      platform: "cpu" for the processors of a machine, which are one device; else "gpu", for any accelerator.
    """

    name: str
    description: str
    memory_gib: float
    bandwidth_tb_s: float
    bf16_tflops: float
    fp8_tflops: float | None
    link_gb_s: float
    int8_tops: float | None = None
    network_gb_s: float | None = None
    devices_per_machine: int = 8
    usd_per_hour: float | None = None
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)
    platform: str = "gpu"

    @property
    def is_host(self) -> bool:
        """Whether it is a machine's processors and memory, to which accelerators are linked."""
        return self.platform == "cpu"


def list_hardware() -> list[str]:
    """Names of the devices in the table."""
    return sorted(file.stem for file in resources.find("configs/hardware").glob("*.yaml"))


def load_hardware(name: str) -> Hardware:
    """Reads a device of the table, or a file in the same format.

    Args:
      name: As in `list_hardware`, optionally without what follows a hyphen if that is unambiguous ("h100" is "h100-sxm"),
        or the path of a YAML file.

    Raises:
      ValueError: If there is no such device, or the file lacks a number.
    """
    path = pathlib.Path(name).expanduser()
    if not path.is_file():
        known = list_hardware()
        longer = [one for one in known if one.startswith(f"{name.lower()}-")]
        name = name.lower() if name.lower() in known else longer[0] if len(longer) == 1 else name
        if name not in known:
            raise ValueError(
                f"no hardware {name}: give the path of a YAML file, or a name{describe_known(name, known)}"
            )
        path = resources.find(f"configs/hardware/{name}.yaml")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, Mapping):
        raise ValueError(f"{path} holds {type(values).__name__}; a mapping is needed")
    unknown = sorted(str(key) for key in values.keys() - {*_NUMBERS, *_OPTIONAL_NUMBERS, *_OTHERS})
    if unknown:
        allowed = sorted([*_NUMBERS, *_OPTIONAL_NUMBERS, *_OTHERS])
        raise ValueError(f"{path}: unknown key {unknown[0]}{describe_known(unknown[0], allowed)}")
    numbers = {key: _number(path, values, key) for key in _NUMBERS}
    optional = {key: _number(path, values, key) for key in _OPTIONAL_NUMBERS if values.get(key) is not None}
    per_machine = _number(path, values, "devices_per_machine") if "devices_per_machine" in values else 8
    if per_machine != int(per_machine):
        raise ValueError(f"{path}: devices_per_machine is {per_machine}; a whole number of at least 1 is needed")
    platform = values.get("platform", "gpu")
    if platform not in PLATFORMS:
        raise ValueError(f"{path}: platform is {platform!r}; allowed: {', '.join(PLATFORMS)}")
    return Hardware(
        path.stem,
        str(values.get("description", "")),
        **numbers,
        fp8_tflops=optional.pop("fp8_tflops", None),
        devices_per_machine=int(per_machine),
        sources=_sources(path, values),
        platform=platform,
        **optional,
    )


def _sources(path: pathlib.Path, values: Mapping[str, object]) -> dict[str, str]:
    sources = values.get("sources") or {}
    if not isinstance(sources, Mapping):
        raise ValueError(f"{path}: sources is {sources!r}; a mapping from the name of a figure to words is needed")
    for key in sources:
        if key not in _NUMBERS + _OPTIONAL_NUMBERS:
            raise ValueError(
                f"{path}: sources.{key} does not name a figure; there are {', '.join(_NUMBERS + _OPTIONAL_NUMBERS)}"
            )
    return {str(key): str(text) for key, text in sources.items()}


def _number(path: pathlib.Path, values: Mapping[str, object], key: str) -> float:
    value = values.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise ValueError(f"{path}: {key} is {value!r}; a number above 0 is needed")
    return float(value)
