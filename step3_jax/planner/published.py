"""Runs and kernels that were measured, by others but for processors, from `configs/planner/measured.yaml`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

from step3_jax import resources
from step3_jax.planner.data_file import Reader, read_yaml
from step3_jax.planner.shape import KV_DTYPE_BYTES

# Attention and FFN on separate devices; every device does both, with experts spread over all.
AFD, EP = "afd", "ep"
ARRANGEMENTS = (AFD, EP)
# Sequences, and GPUs that share a KV-head-parallel layer, in every row of the layers' times.
LAYER_SEQUENCES, LAYER_DEVICES = 256, 4
_FILE = "configs/planner/measured.yaml"


@dataclasses.dataclass(frozen=True)
class Run:
    """A measured deployment.

    Attributes:
      name: Its name in the file.
      model: In the form of `load_shape`.
      hardware: In the form of `load_hardware`.
      arrangement: `AFD` or `EP`.
      attention_devices: Devices that do attention.
      ffn_devices: Devices that hold experts; with `EP` the same ones.
      context_tokens: Mean context.
      kv_dtype: Dtype of the cache.
      sequences: Total sequences in flight.
      micro_batches: Micro-batches that they are divided into.
      tokens_per_s_per_device: Output tokens per second, divided by all devices.
      source: Who measured it, and what is assumed.
    """

    name: str
    model: str
    hardware: str
    arrangement: str
    attention_devices: int
    ffn_devices: int
    context_tokens: int
    kv_dtype: str
    sequences: int
    micro_batches: int
    tokens_per_s_per_device: float
    source: str

    @property
    def num_devices(self) -> int:
        """Total number of devices."""
        return self.attention_devices + (self.ffn_devices if self.arrangement == AFD else 0)

    @property
    def batch_tokens(self) -> float:
        """Tokens that pass the experts together."""
        return self.sequences / self.micro_batches

    @property
    def sequences_per_device(self) -> float:
        """Sequences that an attention device decodes together."""
        return self.batch_tokens / self.attention_devices


@dataclasses.dataclass(frozen=True)
class LayerTime:
    """A measured attention layer.

    Attributes:
      design: Attention design.
      model: As `load_shape` takes it.
      context_tokens: Context of each sequence.
      us: Microseconds by hardware name.
    """

    design: str
    model: str
    context_tokens: int
    us: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class ProcessorShares:
    """Shares of a processor's rates that this project measured.

    Attributes:
      attention: Of the rate of reading memory, by attention with its projections.
      ffn: The same by the feed-forward layers.
      products: Of the best rate of products, by a whole prompt.
      source: Where and how.
    """

    attention: float
    ffn: float
    products: float
    source: str


@functools.cache
def load_runs() -> Mapping[str, Run]:
    """The measured runs by name.

    Raises:
      ValueError: If the file is wrong.
    """
    runs = _reader().section("runs")
    return {name: _read_run(name, runs.section(name)) for name in runs.keys}


@functools.cache
def load_layer_times() -> tuple[LayerTime, ...]:
    """The measured attention layers.

    Raises:
      ValueError: If the file is wrong.
    """
    return tuple(_read_layer(row) for row in _reader().section("attention_layers").sections("rows"))


@functools.cache
def layer_source() -> str:
    """The source of the layers' times."""
    return _reader().section("attention_layers").text("source")


@functools.cache
def load_processor_shares() -> ProcessorShares:
    """The measured shares of a processor.

    Raises:
      ValueError: If the file is wrong.
    """
    reader = _reader().section("processors")
    found = ProcessorShares(
        attention=reader.number("attention"),
        ffn=reader.number("ffn"),
        products=reader.number("products"),
        source=reader.text("source"),
    )
    reader.check_all_read()
    return found


def _reader() -> Reader:
    return Reader(read_yaml(resources.find(_FILE)), _FILE)


def _read_run(name: str, reader: Reader) -> Run:
    run = Run(
        name=name,
        model=reader.text("model"),
        hardware=reader.text("hardware"),
        arrangement=reader.choice("arrangement", ARRANGEMENTS),
        attention_devices=reader.whole("attention_devices"),
        ffn_devices=reader.whole("ffn_devices"),
        context_tokens=reader.whole("context_tokens"),
        kv_dtype=reader.choice("kv_dtype", KV_DTYPE_BYTES.keys()),
        sequences=reader.whole("sequences"),
        micro_batches=reader.whole("micro_batches"),
        tokens_per_s_per_device=reader.number("tokens_per_s_per_device"),
        source=reader.text("source"),
    )
    reader.check_all_read()
    return run


def _read_layer(reader: Reader) -> LayerTime:
    design, model = reader.text("design"), reader.text("model")
    context_tokens = reader.whole("context_tokens")
    names = [name for name in reader.keys if name not in ("design", "model", "context_tokens")]
    return LayerTime(design, model, context_tokens, {name: reader.number(name) for name in names})
