"""The share of a roofline that real decoding reaches, by attention design, hardware and arrangement, from published runs.

The roofline is that of `planner/cost.py` with a batch: weights are read once for it. A whole run gives the share of each
part at its batch: bubbles, network, imbalance and kernels together. Times of single layers show how designs
and devices differ, so a share is

    share(run) x kernel(design, hardware, context) / kernel(the run's design, hardware and context)

but never more than the kernel alone reaches. Devices without a measurement use a sibling's, and say so. Processors have
the shares that this project measured.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping

from step3_jax.layout.hardware import Hardware, load_hardware
from step3_jax.planner.cost import (
    TokenWork,
    attention_roofline_seconds,
    count_token_work,
    ffn_roofline_seconds,
    peak_flops,
)
from step3_jax.planner.published import (
    AFD,
    EP,
    LAYER_DEVICES,
    LAYER_SEQUENCES,
    LayerTime,
    Run,
    layer_source,
    load_layer_times,
    load_processor_shares,
    load_runs,
)
from step3_jax.planner.shape import ModelShape, load_shape

# The run that represents an arrangement, by KV dtype. No run measured four-bit caches: the FP8 run represents them.
_BASE_RUNS: Mapping[tuple[str, str], str] = {
    (AFD, "fp8"): "step3-2a2f",
    (AFD, "int4"): "step3-2a2f",
    (AFD, "bfloat16"): "step3-3a2f",
    (EP, "fp8"): "dsv3-profile",
    (EP, "int4"): "dsv3-profile",
    (EP, "bfloat16"): "dsv3-profile",
}
# Devices without measured layers, and the sibling that represents them; H800 for all others.
_SIBLINGS: Mapping[str, str] = {"a100-80gb": "a800"}
_ANY_DEVICE = "h800"
# Designs without a measured layer, and the one that represents them.
_DESIGNS: Mapping[str, str] = {"hybrid": "gqa", "linear": "gqa"}


@dataclasses.dataclass(frozen=True)
class Share:
    """A share of a roofline.

    Attributes:
      value: Above 0, at most 1.
      source: Its source, for people.
      is_measured: Whether exactly this design, device and arrangement was measured; else it is carried over.
    """

    value: float
    source: str
    is_measured: bool


@dataclasses.dataclass(frozen=True)
class Batch:
    """How many sequences meet at a device and at the experts, on which the roofline depends.

    Attributes:
      tokens: Tokens that pass one copy of the experts together: a micro-batch.
      kv_bytes_per_device: Bytes of cache that an attention device reads for a micro-batch, in all layers. A
        deployment keeps it when the context changes: more and shorter sequences, in the same time.
    """

    tokens: float
    kv_bytes_per_device: float

    def sequences_per_device(self, work: TokenWork) -> float:
        """Sequences that an attention device decodes together."""
        return self.kv_bytes_per_device / work.kv_bytes


@dataclasses.dataclass(frozen=True)
class PoolShares:
    """Shares of the roofline that a run reached, at its batch.

    Attributes:
      attention: Share of attention with its projections.
      ffn: Share of the feed-forward layers. Under `EP` the same number: one device does both, and only their sum is known.
    """

    attention: float
    ffn: float


def base_run(arrangement: str, kv_dtype: str = "fp8") -> Run:
    """The run that shares are taken from."""
    return load_runs()[_BASE_RUNS[arrangement, kv_dtype]]


def base_batch(arrangement: str, kv_dtype: str = "fp8") -> Batch:
    """The batch of that run."""
    run = base_run(arrangement, kv_dtype)
    kv_bytes = load_shape(run.model).kv_bytes_read(run.context_tokens, run.kv_dtype)
    return Batch(run.batch_tokens, run.sequences_per_device * kv_bytes)


@functools.cache
def fit_shares(run: Run) -> PoolShares:
    """The shares that a run reached.

    Under AFD the two pools' device seconds are known separately. If one side waits for the other, its share is a lower
    bound.
    """
    attention, ffn = _roofline(run)
    rate = run.tokens_per_s_per_device * run.num_devices
    if run.arrangement == EP:
        share = (attention + ffn) * rate / run.num_devices
        return PoolShares(share, share)
    return PoolShares(attention * rate / run.attention_devices, ffn * rate / run.ffn_devices)


def predict_rate(run: Run, shares: PoolShares) -> float:
    """Tokens per second and device that a deployment would reach with these shares, at the run's batch."""
    attention, ffn = _roofline(run)
    attention, ffn = attention / shares.attention, ffn / shares.ffn
    if run.arrangement == EP:
        return 1 / (attention + ffn)
    return min(run.attention_devices / attention, run.ffn_devices / ffn) / run.num_devices


def attention_share(
    design: str,
    hardware: Hardware,
    *,
    context_tokens: float,
    kv_dtype: str = "fp8",
    arrangement: str = AFD,
) -> Share:
    """The share of the roofline that attention with its projections is expected to reach.

    Args:
      design: The model's design: "mfa", "mla", "gqa", "linear" or "hybrid".
      hardware: The attention devices.
      context_tokens: Context of the sequences.
      kv_dtype: Dtype of the cache.
      arrangement: `AFD` or `EP`.
    """
    if hardware.is_host:
        return _processor_share(hardware, load_processor_shares().attention)
    run = base_run(arrangement, kv_dtype)
    run_design = load_shape(run.model).design
    own, reference = kernel_share(design, hardware, context_tokens), base_kernel_share(run)
    value = min(fit_shares(run).attention * own.value / reference.value, own.value)
    carried = []
    if (design, hardware.name) != (run_design, run.hardware):
        carried.append(f"from {run_design} on {run.hardware} to {design} on {hardware.name} with {own.source}")
    if kv_dtype != run.kv_dtype:
        carried.append(f"from {run.kv_dtype} caches to {kv_dtype}")
    if not carried:
        return Share(value, run.source, own.is_measured)
    return Share(value, f"{run.source}; carried over {' and '.join(carried)}", False)


def ffn_share(hardware: Hardware, *, kv_dtype: str = "fp8", arrangement: str = AFD) -> Share:
    """The share of the roofline that the feed-forward layers are expected to reach.

    Args:
      hardware: The FFN devices.
      kv_dtype: Dtype of the cache, which chooses the run.
      arrangement: `AFD` or `EP`.
    """
    if hardware.is_host:
        return _processor_share(hardware, load_processor_shares().ffn)
    run = base_run(arrangement, kv_dtype)
    if hardware.name == run.hardware:
        return Share(fit_shares(run).ffn, run.source, True)
    return Share(
        fit_shares(run).ffn, f"{run.source}; nothing is published for {hardware.name}, the same share assumed", False
    )


def _processor_share(hardware: Hardware, read: float) -> Share:
    """The lesser share, as it depends on the batch which rate binds."""
    found = load_processor_shares()
    return Share(min(read, found.products), f"{found.source}; carried over to {hardware.name}", False)


@functools.cache
def _layer_shares() -> Mapping[tuple[str, str], list[tuple[int, float]]]:
    """Context and share of each measured layer, by design and device."""
    found: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in load_layer_times():
        for device, us in row.us.items():
            found.setdefault((row.design, device), []).append((row.context_tokens, layer_roofline_us(row, device) / us))
    return {key: sorted(points) for key, points in found.items()}


def kernel_share(design: str, hardware: Hardware, context_tokens: float) -> Share:
    """The share of the roofline that one attention layer reaches alone, interpolated in the logarithm of the context.

    Args:
      design: "mfa", "mla", "gqa", "linear" or "hybrid".
      hardware: The device.
      context_tokens: Context; outside the measured range, the nearest one.
    """
    shares, wanted_design = _layer_shares(), _DESIGNS.get(design, design)
    device = hardware.name
    if (wanted_design, device) not in shares:
        device = _SIBLINGS.get(device, _ANY_DEVICE)
    if (wanted_design, device) not in shares:
        # MLA has no row on A800.
        device = _ANY_DEVICE
    points = shares[wanted_design, device]
    value = _interpolate(points, context_tokens)
    is_measured = device == hardware.name and wanted_design == design
    stand_in = "" if is_measured else f", the layer times of {wanted_design} on {device} in its place"
    return Share(min(value, 1.0), f"{layer_source()}{stand_in}", is_measured)


def base_kernel_share(run: Run) -> Share:
    """The share that one attention layer reaches alone with a run's design, hardware and context."""
    return kernel_share(load_shape(run.model).design, load_hardware(run.hardware), run.context_tokens)


def layer_roofline_us(row: LayerTime, device: str) -> float:
    """The minimum microseconds of a measured attention layer: weights read once, a BF16 cache, 8-bit products.

    Args:
      row: The layer.
      device: A hardware name of the row.
    """
    shape, hardware = load_shape(row.model), load_hardware(device)
    work = count_token_work(shape, row.context_tokens, "bfloat16", rule="exact")
    sequences = LAYER_SEQUENCES / LAYER_DEVICES
    if row.design == "gqa":
        # Heads are sharded over the devices: each has a part of every sequence and of the weights.
        parts = LAYER_SEQUENCES / sequences
        work = dataclasses.replace(
            work,
            kv_bytes=work.kv_bytes / parts,
            attention_flops=work.attention_flops / parts,
            projection_flops=work.projection_flops / parts,
        )
        seconds = _layer_seconds(shape, work, hardware, LAYER_SEQUENCES, shape.projection_weights() / parts)
    else:
        seconds = _layer_seconds(shape, work, hardware, sequences, shape.projection_weights())
    return seconds * 1e6 / shape.num_layers


def cross_check(arrangement: str) -> list[tuple[Run, Run, float]]:
    """How well shares fitted on one run of an arrangement predict the others.

    Returns:
      The fitted run, the predicted run, and the error of the predicted tokens per second: 0.1 is 10 % too many.
    """
    runs = [run for run in load_runs().values() if run.arrangement == arrangement]
    return [
        (fitted, other, predict_rate(other, _carry_over(fitted, other)) / other.tokens_per_s_per_device - 1)
        for fitted in runs
        for other in runs
        if other is not fitted
    ]


def _carry_over(fitted: Run, other: Run) -> PoolShares:
    """The shares of one run as expected for another."""
    shares = fit_shares(fitted)
    own, reference = base_kernel_share(other).value, base_kernel_share(fitted).value
    return PoolShares(min(shares.attention * own / reference, own), shares.ffn)


def _roofline(run: Run) -> tuple[float, float]:
    """Device seconds of a token's attention, and of its feed-forward layers, at the batch of a run."""
    shape, hardware = load_shape(run.model), load_hardware(run.hardware)
    work = count_token_work(shape, run.context_tokens, run.kv_dtype, rule="exact")
    return (
        attention_roofline_seconds(shape, work, hardware, run.sequences_per_device),
        ffn_roofline_seconds(shape, hardware, run.batch_tokens),
    )


def _layer_seconds(
    shape: ModelShape, work: TokenWork, hardware: Hardware, sequences: float, weight_bytes: float
) -> float:
    """Seconds of all layers' attention for some sequences on one device."""
    bandwidth = hardware.bandwidth_tb_s * 1e12
    products = peak_flops(hardware)
    if hardware.fp8_tflops is None and hardware.int8_tops is not None:
        products = hardware.int8_tops * 1e12
    core = max(work.kv_bytes / bandwidth, work.attention_flops / peak_flops(hardware, "bfloat16"))
    return sequences * core + max(weight_bytes / bandwidth, sequences * work.projection_flops / products)


def _interpolate(points: list[tuple[int, float]], context_tokens: float) -> float:
    for (left, low), (right, high) in itertools.pairwise(points):
        if context_tokens <= left:
            return low
        if context_tokens < right:
            part = math.log(context_tokens / left) / math.log(right / left)
            return low + part * (high - low)
    return points[-1][1]
