"""The table of devices: `configs/hardware/`, one file each."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping

import yaml

from step3_jax import resources


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One device.

    Attributes:
      name: The file's, without its ending.
      description: One line for people.
      memory_gib: As the driver reports it, in GiB.
      bandwidth_tb_s: Of its memory, in TB/s.
      bf16_tflops: Peak of BF16 products, dense, in 1e12 operations a second.
      fp8_tflops: Of FP8 products; None where the device has none.
      link_gb_s: To the other devices of its machine, in GB/s in each direction.
    """

    name: str
    description: str
    memory_gib: float
    bandwidth_tb_s: float
    bf16_tflops: float
    fp8_tflops: float | None
    link_gb_s: float


def list_hardware() -> list[str]:
    """Names of the devices in the table."""
    return sorted(file.stem for file in resources.find("configs/hardware").glob("*.yaml"))


def load_hardware(name: str) -> Hardware:
    """Reads a device of the table, or a file of the same form.

    Args:
      name: As in `list_hardware`, or the path of a YAML file.

    Raises:
      ValueError: If there is none of that name, or the file lacks a number.
    """
    path = pathlib.Path(name).expanduser()
    if not path.is_file():
        known = list_hardware()
        if name not in known:
            raise ValueError(f"no hardware {name}: give the path of a YAML file, or one of {', '.join(known)}")
        path = resources.find(f"configs/hardware/{name}.yaml")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, Mapping):
        raise ValueError(f"{path} holds {type(values).__name__}; a mapping is needed")
    fields = {field.name for field in dataclasses.fields(Hardware)} - {"name"}
    unknown = sorted(str(key) for key in values.keys() - fields)
    if unknown:
        raise ValueError(f"{path}: unknown key {unknown[0]}; allowed: {', '.join(sorted(fields))}")
    numbers = {key: _number(path, values, key) for key in sorted(fields - {"description", "fp8_tflops"})}
    fp8 = None if values.get("fp8_tflops") is None else _number(path, values, "fp8_tflops")
    return Hardware(path.stem, str(values.get("description", "")), fp8_tflops=fp8, **numbers)


def _number(path: pathlib.Path, values: Mapping[str, object], key: str) -> float:
    value = values.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise ValueError(f"{path}: {key} is {value!r}; a number above 0 is needed")
    return float(value)
