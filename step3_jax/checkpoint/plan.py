"""What a conversion writes: one task for each tensor of the source, and the result's configuration."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Literal

from step3_jax.checkpoint.form import CONFIG_DTYPES, DTYPE_CHOICES, FORMS
from step3_jax.checkpoint.names import SCALE_SUFFIX, expected_tensors, is_fp8_tensor, scale_name
from step3_jax.checkpoint.placement import Band, Placement, as_matrices
from step3_jax.checkpoint.reader import FP8_DTYPE
from step3_jax.checkpoint.safetensors_io import DTYPES
from step3_jax.checkpoint.shards import plan_shards
from step3_jax.checkpoint.source import Source
from step3_jax.checkpoint.zarr_array import StoredArray
from step3_jax.config import QuantConfig
from step3_jax.layout.tensor import scale_shape

Action = Literal["copy", "cast", "quantise", "dequantise"]
Tensors = Mapping[str, Placement | StoredArray]

# Names of --dtype -> safetensors' name.
PLAIN_DTYPES = {"bf16": "BF16", "fp8": "BF16", "float32": "F32"}
UNIT_BYTES = 2**24


@dataclasses.dataclass(frozen=True)
class Task:
    """One tensor of the source, and what is done with it.

    Attributes:
      name: Released name of the tensor, in the source and in the result.
      action: "copy" of the bytes; "cast" between plain dtypes; "quantise" gives values and scales of a plain tensor;
        "dequantise" takes both.
      shape: Shape of the tensor.
      source_dtype: Its dtype, by its safetensors name.
      dtype: The dtype of the result.
    """

    name: str
    action: Action
    shape: tuple[int, ...]
    source_dtype: str
    dtype: str

    @property
    def is_lossy(self) -> bool:
        """Whether values may change."""
        # Of two dtypes of the same size (BF16 and F16), neither holds all values of the other.
        wider = DTYPES[self.dtype].itemsize > DTYPES[self.source_dtype].itemsize
        return self.action == "quantise" or (self.action == "cast" and not wider)

    def outputs(self, block: tuple[int, int]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> dtype and shape of the written tensors."""
        written = {self.name: (self.dtype, self.shape)}
        if self.action == "quantise":
            written[scale_name(self.name)] = ("F32", scale_shape(self.shape, block))
        return written

    def bands(self, max_bytes: int, block: tuple[int, int]) -> list[Band]:
        """The bands it is done in: at most `max_bytes` read or written, whole blocks."""
        matrices, rows, _ = as_matrices(self.shape)
        return self.cut(Band(0, matrices, 0, rows), max_bytes, block)

    def cut(self, band: Band, max_bytes: int, block: tuple[int, int]) -> list[Band]:
        """Cuts a band that starts at a block as `bands` cuts the tensor."""
        itemsize = max(DTYPES[self.source_dtype].itemsize, DTYPES[self.dtype].itemsize)
        multiple = block[0] if self.action in ("quantise", "dequantise") else 1
        row_bytes = max(as_matrices(self.shape)[2] * itemsize, 1)
        return band.cut(row_bytes, max_bytes=max_bytes, multiple=multiple)

    def num_bytes(self, band: Band) -> int:
        """Bytes of a band in the source, without scales."""
        columns = as_matrices(self.shape)[2]
        return (band.last - band.first) * (band.stop - band.start) * columns * DTYPES[self.source_dtype].itemsize


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a conversion will do.

    Attributes:
      source: The checkpoint to read.
      form: "orbax" or "hf".
      dtype: "bf16", "fp8", "float32", or None to keep each tensor's own.
      tasks: One for each tensor of the source.
      shard_bytes: Most bytes of a shard ("hf").
      unit_bytes: Bytes of a unit of work.
    """

    source: Source
    form: str
    dtype: str | None
    tasks: list[Task]
    shard_bytes: int
    unit_bytes: int

    @property
    def outputs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> dtype and shape of each tensor of the result, in order."""
        return {name: output for task in self.tasks for name, output in task.outputs(self.source.block).items()}

    @property
    def output_bytes(self) -> list[int]:
        """Bytes of each tensor of the result."""
        return [Placement(dtype, shape, pathlib.Path()).num_bytes for dtype, shape in self.outputs.values()]

    @property
    def num_shards(self) -> int:
        return len(plan_shards(self.output_bytes, self.shard_bytes))

    def units(self) -> Iterator[tuple[Task, int, Band]]:
        """Task, number of the band in it, and band."""
        for task in self.tasks:
            for number, band in enumerate(task.bands(self.unit_bytes, self.source.block)):
                yield task, number, band


def plan_tasks(source: Source, dtype: str | None) -> list[Task]:
    """The tasks of a conversion, in the order of the model's layers; scales come after their values.

    Args:
      source: The checkpoint to convert.
      dtype: "bf16", "fp8", "float32", or None to keep each tensor's own.

    Raises:
      ValueError: For another dtype.
    """
    if dtype is not None and dtype not in DTYPE_CHOICES:
        raise ValueError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPE_CHOICES)}")
    tasks = []
    for name in expected_tensors(source.config):
        tasks.append(_plan(name, source.tensors[name], dtype))
        scales = source.tensors.get(scale_name(name))
        if scales is not None and tasks[-1].action == "copy":
            # If FP8 is asked for, it is the release's, whose scales are float32.
            target = scales.dtype if dtype is None else "F32"
            action: Action = "copy" if target == scales.dtype else "cast"
            tasks.append(Task(scale_name(name), action, scales.shape, scales.dtype, target))
    return tasks


def plan_conversion(
    source: Source,
    *,
    form: str | None = None,
    dtype: str | None = None,
    shard_bytes: int = 5 * 10**9,
    unit_bytes: int = UNIT_BYTES,
) -> Plan:
    """Plans a conversion.

    Args:
      source: The checkpoint to read.
      form: "orbax", "hf", or None for the one that the source does not have.
      dtype: "bf16", "fp8" (and bf16 for the rest), "float32", or None to keep each tensor's own.
      shard_bytes: A shard's tensors have at most this many bytes; a larger tensor gets its own shard.
      unit_bytes: Bytes of a unit of work; the same in all runs of one conversion.

    Raises:
      ValueError: For an unknown form or dtype, or sizes that are not positive.
    """
    form = form or {"hf": "orbax", "orbax": "hf"}[source.form]
    if form not in FORMS:
        raise ValueError(f"the form is {form!r}; allowed: {', '.join(FORMS)}")
    for name, value in (("shard_bytes", shard_bytes), ("unit_bytes", unit_bytes)):
        if value <= 0:
            raise ValueError(f"{name} is {value}; a positive number is needed")
    return Plan(source, form, dtype, plan_tasks(source, dtype), shard_bytes, unit_bytes)


def compare_tasks(source: Tensors, result: Tensors) -> list[Task]:
    """The tasks that make `result` from `source`, derived from the dtypes of both.

    Raises:
      ValueError: If the two do not have the same tensors.
    """
    tasks = []
    for name, place in source.items():
        if name not in result:
            values = result.get(name.removesuffix(SCALE_SUFFIX))
            if name.endswith(SCALE_SUFFIX) and values is not None and values.dtype != FP8_DTYPE:
                continue  # Dequantised: the values' task reads it.
            raise ValueError(f"the result lacks {name}")
        found = result[name]
        if found.shape != place.shape:
            raise ValueError(f"{name} is {list(place.shape)} in the source and {list(found.shape)} in the result")
        if found.dtype == place.dtype:
            action: Action = "copy"
        elif found.dtype == FP8_DTYPE:
            action = "quantise"
        else:
            action = "dequantise" if place.dtype == FP8_DTYPE else "cast"
        tasks.append(Task(name, action, place.shape, place.dtype, found.dtype))
    made = {name for task in tasks for name in (task.name, scale_name(task.name))}
    extra = sorted(name for name in result if name not in made)
    if extra:
        raise ValueError(f"the result has {len(extra)} tensors that the source does not have: {', '.join(extra[:20])}")
    return tasks


def result_config(text: bytes, tasks: list[Task], dtype: str | None, block: tuple[int, int]) -> bytes:
    """config.json of the result: the source's, byte for byte where nothing changes; unknown keys are kept.

    Args:
      text: config.json of the source.
      tasks: The conversion's tasks.
      dtype: As for `plan_tasks`.
      block: Rows and columns that share a scale.
    """
    values = json.loads(text)
    has_fp8 = any(task.dtype == FP8_DTYPE for task in tasks)
    before = json.dumps(values)
    if dtype is not None:
        sections = [values, values.get("text_config"), values.get("vision_config")]
        for section in sections:
            for key in ("torch_dtype", "dtype"):
                if isinstance(section, dict) and isinstance(section.get(key), str):
                    section[key] = CONFIG_DTYPES[dtype]
        if "dtype" not in values:
            values["torch_dtype"] = CONFIG_DTYPES[dtype]
    if dtype is not None and not has_fp8:
        values.pop("quantization_config", None)
    if has_fp8 and not values.get("quantization_config"):
        quantization = dataclasses.asdict(QuantConfig(weight_block_size=block))
        values["quantization_config"] = quantization | {"weight_block_size": list(block)}
    if json.dumps(values) == before:
        return text
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


def _plan(name: str, place: Placement | StoredArray, dtype: str | None) -> Task:
    target = place.dtype if dtype is None else PLAIN_DTYPES[dtype]
    if dtype == "fp8" and is_fp8_tensor(name):
        target = FP8_DTYPE
    if target == place.dtype:
        action: Action = "copy"
    elif target == FP8_DTYPE:
        action = "quantise"
    else:
        action = "dequantise" if place.dtype == FP8_DTYPE else "cast"
    return Task(name, action, place.shape, place.dtype, target)
