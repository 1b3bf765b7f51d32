"""Device time and money of one decoded token: the ideal of arXiv 2507.19427 (section 4), and a roofline that reads weights.

Ideal: attention and FFN each run at the peak or at the bandwidth of their device, whichever binds; weights are read for so
many tokens that they cost nothing; no network and no waiting. The roofline has a batch, so reading weights counts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from step3_jax.layout.hardware import Hardware
from step3_jax.planner.attention import CountRule
from step3_jax.planner.shape import ModelShape

MEMORY, COMPUTE = "memory", "compute"
SECONDS_PER_HOUR = 3600
TOKENS_PER_PRICE = 1e6
# Two thirds of a stage of 16.6 ms: report, section 5.4.
NETWORK_WINDOW_S = 0.0111


@dataclasses.dataclass(frozen=True)
class TokenWork:
    """The work of one decoded token, in all layers of a model.

    Attributes:
      kv_bytes: Bytes of KV cache moved.
      attention_flops: FLOPs of scores and values.
      projection_flops: FLOPs of the matrices before and after attention.
      ffn_flops: FLOPs of the feed-forward layers.
      attention_dtype: Dtype in which scores and values are computed: "fp8", or "bfloat16" with a BF16 cache.
    """

    kv_bytes: float
    attention_flops: float
    projection_flops: float
    ffn_flops: float
    attention_dtype: str


@dataclasses.dataclass(frozen=True)
class Prices:
    """Prices of devices per hour.

    Attributes:
      given: The user's USD by hardware name; they override the files.
    """

    given: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def usd_per_hour(self, hardware: Hardware) -> float | None:
        """USD per hour of one device; None if neither the user nor the file has a price."""
        return self.given.get(hardware.name, hardware.usd_per_hour)

    def source(self, hardware: Hardware) -> str:
        """The source of the price."""
        if hardware.name in self.given:
            return "given with --price"
        return hardware.sources.get("usd_per_hour", "the hardware's file") if hardware.usd_per_hour else "no price"


def count_token_work(
    shape: ModelShape, context_tokens: float, kv_dtype: str = "fp8", *, rule: CountRule = "report"
) -> TokenWork:
    """Counts the work of one decoded token.

    Args:
      shape: The model.
      context_tokens: Tokens that it attends to.
      kv_dtype: One of `KV_DTYPE_BYTES`. Four-bit numbers are computed in 8 bits.
      rule: How MLA's value product is counted.

    Raises:
      ValueError: For a context below 1, or an unknown dtype.
    """
    if not context_tokens >= 1:
        raise ValueError(f"a context of {context_tokens} tokens: at least 1 is needed")
    return TokenWork(
        kv_bytes=shape.kv_bytes_read(context_tokens, kv_dtype),
        attention_flops=shape.attention_flops(context_tokens, rule),
        projection_flops=shape.projection_flops(),
        ffn_flops=shape.ffn_flops(),
        attention_dtype="bfloat16" if kv_dtype == "bfloat16" else "fp8",
    )


def peak_flops(hardware: Hardware, dtype: str = "fp8") -> float:
    """FLOPs per second of products in a dtype.

    A device without FP8 products stores FP8 and computes in 16 bits, as in the report.
    """
    if dtype == "fp8" and hardware.fp8_tflops is not None:
        return hardware.fp8_tflops * 1e12
    return hardware.bf16_tflops * 1e12


def bandwidth_bytes_per_s(hardware: Hardware) -> float:
    """Bytes per second of the device's memory."""
    return hardware.bandwidth_tb_s * 1e12


def attention_seconds(work: TokenWork, hardware: Hardware) -> float:
    """Ideal device seconds of one token's attention with its projections: C_att of the report's section 4."""
    return max(_core_seconds(work, hardware)) + work.projection_flops / peak_flops(hardware)


def ffn_seconds(work: TokenWork, hardware: Hardware) -> float:
    """Ideal device seconds of one token's feed-forward layers: C_ffn of the report's section 4."""
    return work.ffn_flops / peak_flops(hardware)


def attention_bound(work: TokenWork, hardware: Hardware) -> str:
    """The bottleneck of scores and values: `MEMORY` or `COMPUTE`."""
    by_bytes, by_flops = _core_seconds(work, hardware)
    return MEMORY if by_bytes >= by_flops else COMPUTE


def attention_roofline_seconds(
    shape: ModelShape, work: TokenWork, hardware: Hardware, sequences_per_device: float
) -> float:
    """Device seconds of one token's attention where each device reads its FP8 projections once for its sequences.

    Args:
      shape: The model.
      work: The work of one token.
      hardware: The attention side's hardware.
      sequences_per_device: Sequences that a device decodes together.
    """
    by_bytes = shape.projection_weights() / (bandwidth_bytes_per_s(hardware) * sequences_per_device)
    return max(_core_seconds(work, hardware)) + max(by_bytes, work.projection_flops / peak_flops(hardware))


def ffn_roofline_seconds(shape: ModelShape, hardware: Hardware, batch_tokens: float) -> float:
    """Device seconds of one token's feed-forward layers if the experts are read once for a batch.

    Over all devices that together hold one copy of the FP8 experts, spread evenly over them.

    Args:
      shape: The model.
      hardware: The FFN side's.
      batch_tokens: Tokens that pass one copy of the experts together.
    """
    by_bytes = shape.ffn_weights_read(batch_tokens) / (bandwidth_bytes_per_s(hardware) * batch_tokens)
    return max(by_bytes, shape.ffn_flops() / peak_flops(hardware))


def ffn_bound(shape: ModelShape, hardware: Hardware, batch_tokens: float) -> str:
    """The bottleneck of the feed-forward layers of a batch: `MEMORY` or `COMPUTE`."""
    is_compute = ffn_roofline_seconds(shape, hardware, batch_tokens) <= shape.ffn_flops() / peak_flops(hardware)
    return COMPUTE if is_compute else MEMORY


def smallest_active_share(shape: ModelShape, hardware: Hardware, *, window_s: float = NETWORK_WINDOW_S) -> float:
    """The smallest share of active experts with which FFN devices can be busy while the network is hidden (section 5.4).

    A machine receives FP8 and returns BF16 tokens, 3 bytes per number, over its interfaces, both directions added up as
    in the report. The tokens that arrive in the window must be enough for the experts' weights not to be the bottleneck.

    Args:
      shape: The model.
      hardware: The FFN devices.
      window_s: Seconds for all layers' exchange.

    Raises:
      ValueError: If the network of the hardware is not known.
    """
    if hardware.network_gb_s is None:
        raise ValueError(f"{hardware.name} has no network_gb_s: give a hardware file that has it")
    network = hardware.devices_per_machine * hardware.network_gb_s * 1e9
    ridge = peak_flops(hardware) / bandwidth_bytes_per_s(hardware)
    # 3 bytes for each of ridge / 2 tokens in a stage are 1 byte for each of ridge tokens in two thirds of it.
    return shape.hidden_size * shape.num_layers * ridge / (network * window_s)


def usd_per_million_tokens(device_seconds: float, usd_per_hour: float) -> float:
    """USD per million tokens that each take some device seconds."""
    return device_seconds * TOKENS_PER_PRICE * usd_per_hour / SECONDS_PER_HOUR


def cheapest(seconds: Sequence[tuple[Hardware, float]], prices: Prices) -> Hardware:
    """The device on which a part costs least; if a price is missing, the one on which it takes the least time.

    Args:
      seconds: Devices, and the seconds that the part takes on each.
      prices: Their prices.

    Raises:
      ValueError: If there are no devices.
    """
    if not seconds:
        raise ValueError("no hardware to choose from: give at least one")
    rates = [prices.usd_per_hour(hardware) for hardware, _ in seconds]
    known = [rate for rate in rates if rate is not None]
    costs = known if len(known) == len(rates) else [1.0] * len(rates)
    return min(zip(seconds, costs, strict=True), key=lambda pair: pair[0][1] * pair[1])[0][0]


def _core_seconds(work: TokenWork, hardware: Hardware) -> tuple[float, float]:
    """Seconds of scores and values by bytes, and by FLOPs."""
    return (
        work.kv_bytes / bandwidth_bytes_per_s(hardware),
        work.attention_flops / peak_flops(hardware, work.attention_dtype),
    )
