"""How long the stages take: by a model's arithmetic on given devices, or as given or measured.

Ideal times are the roofline of `planner/cost.py`: memory or arithmetic, whichever binds, with weights read once per
micro-batch. Expected ones divide that by the shares that published runs reached (`planner/efficiency.py`), which include
the network, the bubbles and the imbalance of these runs. Work is spread evenly over a side's devices and the layers.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

from step3_jax.layout.hardware import Hardware
from step3_jax.layout.payload import PayloadSize
from step3_jax.planner.cost import attention_roofline_seconds, count_token_work, ffn_roofline_seconds, peak_flops
from step3_jax.planner.efficiency import attention_share, ffn_share
from step3_jax.planner.shape import ModelShape


class StageTimer(Protocol):
    """Seconds of one layer of a micro-batch, and what crosses."""

    @property
    def sources(self) -> tuple[str, ...]:
        """The source of the times, for people."""

    def attention_s(self, num_rows: float, context_tokens: float) -> float:
        """Seconds on an attention device that decodes `num_rows` sequences with a mean context."""

    def ffn_s(self, num_rows: float) -> float:
        """Seconds on the FFN devices, for the rows of the whole micro-batch."""

    def prefill_s(self, num_tokens: float, context_tokens: float) -> float:
        """Seconds on an attention device that prefills tokens, each attending to a mean context."""

    def way(self, num_rows: float) -> tuple[float, float]:
        """The cost of sending an attention instance's rows to one FFN instance, and back: bytes or seconds."""


@dataclasses.dataclass(frozen=True)
class RooflineTimer:
    """Times by arithmetic.

    Attributes:
      shape: The model.
      kv_dtype: Dtype of the cache.
      attention: Devices of the attention side.
      ffn: Devices of the FFN side.
      num_ffn_devices: Devices that together hold one copy of the experts.
      payload: What crosses.
      attention_reached: Share of the roofline; 1 for the ideal.
      ffn_reached: The same for the FFN side.
      sources: The sources of the shares.
    """

    shape: ModelShape
    kv_dtype: str
    attention: Hardware
    ffn: Hardware
    num_ffn_devices: int
    payload: PayloadSize
    attention_reached: float = 1.0
    ffn_reached: float = 1.0
    sources: tuple[str, ...] = ("roofline of the devices' peaks: nothing was measured",)

    def expected(self, context_tokens: float) -> RooflineTimer:
        """The same with the shares that published runs reached.

        Args:
          context_tokens: Context of the sequences; the share of attention depends on it.
        """
        attention = attention_share(
            self.shape.design, self.attention, context_tokens=context_tokens, kv_dtype=self.kv_dtype
        )
        ffn = ffn_share(self.ffn, kv_dtype=self.kv_dtype)
        return dataclasses.replace(
            self,
            attention_reached=attention.value,
            ffn_reached=ffn.value,
            sources=(
                f"attention reaches {attention.value:.0%} of its roofline: {attention.source}",
                f"FFN reaches {ffn.value:.0%} of its roofline: {ffn.source}",
            ),
        )

    def attention_s(self, num_rows: float, context_tokens: float) -> float:
        """As `StageTimer` has it."""
        if not num_rows:
            return 0.0
        work = count_token_work(self.shape, max(1.0, context_tokens), self.kv_dtype, rule="exact")
        seconds = num_rows * attention_roofline_seconds(self.shape, work, self.attention, num_rows)
        return seconds / self.shape.num_layers / self.attention_reached

    def ffn_s(self, num_rows: float) -> float:
        """As `StageTimer` has it."""
        if not num_rows:
            return 0.0
        seconds = num_rows * ffn_roofline_seconds(self.shape, self.ffn, num_rows)
        return seconds / self.num_ffn_devices / self.shape.num_layers / self.ffn_reached

    def prefill_s(self, num_tokens: float, context_tokens: float) -> float:
        """See `StageTimer`; the cache is read once per chunk, so that arithmetic or the projections' weights bind."""
        if not num_tokens:
            return 0.0
        work = count_token_work(self.shape, max(1.0, context_tokens), self.kv_dtype, rule="exact")
        projections = self.shape.projection_weights() / (self.attention.bandwidth_tb_s * 1e12)
        projections = max(projections, num_tokens * work.projection_flops / peak_flops(self.attention))
        core = num_tokens * work.attention_flops / peak_flops(self.attention, work.attention_dtype)
        core = max(core, work.kv_bytes / (self.attention.bandwidth_tb_s * 1e12))
        return (projections + core) / self.shape.num_layers / self.attention_reached

    def way(self, num_rows: float) -> tuple[float, float]:
        """See `StageTimer`; in bytes."""
        return num_rows * self.payload.row_bytes, num_rows * self.payload.output_bytes


@dataclasses.dataclass(frozen=True)
class FixedTimer:
    """Given or measured times, independent of the batch.

    Attributes:
      attention: Seconds of attention.
      to_ffn: Seconds of the way there.
      ffn: Seconds of the FFN.
      to_attention: Seconds of the way back.
      sources: Their sources.
    """

    attention: float
    to_ffn: float
    ffn: float
    to_attention: float
    sources: tuple[str, ...] = ("as given",)

    def attention_s(self, num_rows: float, context_tokens: float) -> float:
        """As `StageTimer` has it."""
        return self.attention if num_rows else 0.0

    def ffn_s(self, num_rows: float) -> float:
        """As `StageTimer` has it."""
        return self.ffn if num_rows else 0.0

    def prefill_s(self, num_tokens: float, context_tokens: float) -> float:
        """As `StageTimer` has it.

        Raises:
          ValueError: Always for tokens: a stage of a decode step does not say how long one of a prompt takes.
        """
        if num_tokens:
            raise ValueError("the given times are for decoding: add --decode-only, or give hardware instead")
        return 0.0

    def way(self, num_rows: float) -> tuple[float, float]:
        """See `StageTimer`; in seconds."""
        return (self.to_ffn, self.to_attention) if num_rows else (0.0, 0.0)
