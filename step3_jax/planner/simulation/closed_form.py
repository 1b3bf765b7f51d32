"""Closed forms of the pipeline's speed, each with the conditions under which it is exact.

They are what `simulate.py` must give with constant times. They come from arXiv 2507.19427, sections 5 to 7, and
from later planners.
"""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class StageTimes:
    """Constant times of the four stages of a layer of one micro-batch, in seconds.

    Attributes:
      attention_s: t_A.
      to_ffn_s: t_A2F.
      ffn_s: t_F.
      to_attention_s: t_F2A.
      latency_s: Latency of each way, in addition to its time.
    """

    attention_s: float
    to_ffn_s: float
    ffn_s: float
    to_attention_s: float
    latency_s: float = 0.0

    @property
    def longest_s(self) -> float:
        """Time of the bottleneck lane."""
        return max(self.attention_s, self.to_ffn_s, self.ffn_s, self.to_attention_s)

    @property
    def around_s(self) -> float:
        """Time of one micro-batch alone: through all lanes and back."""
        return self.attention_s + self.to_ffn_s + self.ffn_s + self.to_attention_s + 2 * self.latency_s


def layer_s(stages: StageTimes, num_microbatches: int) -> float:
    """Seconds of a layer of all micro-batches in the steady state: max(m t_max, t_A + t_A2F + t_F + t_F2A).

    Exact for constant times and m equal micro-batches that go round as soon as a lane is free, with a head that takes
    no time. With m = 3 and no lane idle this is `TPOT = L m max(t_A, t_F, t_comm)` of the report; see `has_no_bubble`.
    """
    return max(num_microbatches * stages.longest_s, stages.around_s)


def step_s(stages: StageTimes, num_layers: int, num_microbatches: int, head_s: float = 0.0) -> float:
    """Seconds of a step, the time per output token, in the steady state: L layers and the head.

    L times `layer_s` without a head. With one, exact for one micro-batch or if attention is the bottleneck
    and never waits inside a step; otherwise a lower bound.
    """
    attention_s = num_layers * stages.attention_s + head_s
    return max(
        num_layers * layer_s(stages, num_microbatches),
        num_microbatches * attention_s,
        num_layers * stages.around_s + head_s,
    )


def has_no_bubble(stages: StageTimes, num_microbatches: int) -> bool:
    """Whether attention never waits: t_A2F + t_F + t_F2A <= (m - 1) t_A, and no other lane takes longer.

    With three micro-batches that is 2 t_A >= t_F + t_C of arXiv 2602.09721, whose other condition, 2 t_F >= t_A + t_C, is
    the same for the FFN side: neither waits if both hold and t_A = t_F.
    """
    others = stages.around_s - stages.attention_s
    return stages.longest_s <= stages.attention_s and others <= (num_microbatches - 1) * stages.attention_s


def lockstep_tick_s(stages: StageTimes, num_microbatches: int, *, is_exchange_on_core: bool = False) -> float:
    """Seconds of a tick in lockstep, with one exchange per tick carrying both directions (`layout` `Schedule`).

    The exchange takes t_X = max(t_A2F, t_F2A) + latency. By the number of micro-batches: 1, where a layer is two ticks and
    each side works in one of them, (t_A + t_F) / 2 + t_X; 2: max(t_A, t_F) + t_X, which with separate ways is the
    max(t_A + t_A2F, t_F + t_F2A) of ai-dynamo's planner; 3: max(t_A, t_F + t_X), as attention's sends overlap with its
    work; 4: max(t_A, t_F, t_X), as both sides' do. Exact for constant times.

    Args:
      stages: Times.
      num_microbatches: 1 to 4.
      is_exchange_on_core: Whether the exchange uses the cores that compute, as gloo does on a CPU: then with 2
        or more it is max(t_A, t_F) + t_X.
    """
    exchange_s = max(stages.to_ffn_s, stages.to_attention_s) + stages.latency_s
    longer_s = max(stages.attention_s, stages.ffn_s)
    if num_microbatches == 1:
        return (stages.attention_s + stages.ffn_s) / 2 + exchange_s
    if num_microbatches == 2 or is_exchange_on_core:
        return longer_s + exchange_s
    if num_microbatches == 3:
        return max(stages.attention_s, stages.ffn_s + exchange_s)
    return max(longer_s, exchange_s)


def stage_budget_s(
    tpot_s: float, num_layers: int, num_microbatches: int = 3, *, gap_s: float = 0.0, accepted: float = 1.0
) -> float:
    """The longest a stage may take: (TPOT accepted - gap) / (m L).

    The report's 50 ms with three micro-batches and 61 layers are 273 us; arXiv 2602.09721 adds the tokens accepted per
    step and the gap between steps. If a gap is m heads it is the inverse of `step_s` with attention as the bottleneck.
    """
    return (tpot_s * accepted - gap_s) / (num_microbatches * num_layers)


def best_ratio(*, attention_s: float, way_s: float, ffn_row_s: float, ffn_fixed_s: float, rows: int) -> float:
    """The ratio of attention to FFN instances that gives the most tokens per instance, as a real number.

    With t_F = a_F r B + b_F the FFN side is the bottleneck above max((t_A - b_F), (t_C - b_F)) / (a_F B); the optimum is
    there, or at sqrt(b_F / (a_F B)) if that is larger (arXiv 2601.21351). Exact if enough micro-batches leave no bubble.

    Args:
      attention_s: t_A of B rows.
      way_s: t_C, the longer way.
      ffn_row_s: a_F.
      ffn_fixed_s: b_F.
      rows: B, rows of an attention instance in a micro-batch.
    """
    slope_s = ffn_row_s * rows
    return max((attention_s - ffn_fixed_s) / slope_s, (way_s - ffn_fixed_s) / slope_s, math.sqrt(ffn_fixed_s / slope_s))


def cycle_s(stages: StageTimes, num_microbatches: int) -> float:
    """Seconds of a layer of one micro-batch in ai-dynamo's planner, which treats both ways as one stage.

    max(t_A, t_F, t_A2F + t_F2A) with m >= 2 + t_C / max(t_A, t_F) micro-batches, t_C being both ways; the sum of all with
    one; else max(t_A + t_A2F, t_F + t_F2A). The first is exact if both ways together are no longer than the longer side,
    or one of them takes no time: here each way has its own lane. The last is exact in lockstep, see
    `lockstep_tick_s`. Latency counts as part of a way.
    """
    to_ffn_s, to_attention_s = stages.to_ffn_s + stages.latency_s, stages.to_attention_s + stages.latency_s
    ways_s, longer_s = to_ffn_s + to_attention_s, max(stages.attention_s, stages.ffn_s)
    if num_microbatches == 1:
        return stages.around_s
    if num_microbatches >= 2 + ways_s / longer_s:
        return max(longer_s, ways_s)
    return max(stages.attention_s + to_ffn_s, stages.ffn_s + to_attention_s)


def speedup(
    *, attention_s: float, dense_s: float, together_s: float, batch_ratio: float, ratio: float, num_microbatches: int
) -> float:
    """Tokens per instance, relative to instances that do both: B_A/B_0 M/(M + N) T_0/T_A (FastAFD, 2026-07).

    T_A = B_A/B_0 T_attention + m T_dense is a step with attention as the bottleneck, reading weights for each micro-batch.
    Exact if that lane never waits.

    Args:
      attention_s: T_attention, a step's attention with the batch of an instance that does both.
      dense_s: T_dense, reading the attention side's weights once.
      together_s: T_0, a step of an instance that does both.
      batch_ratio: B_A/B_0, as attention instances have room for more sequences.
      ratio: M/N, attention instances per FFN instance.
      num_microbatches: m.
    """
    own_s = batch_ratio * attention_s + num_microbatches * dense_s
    return batch_ratio * ratio / (ratio + 1) * together_s / own_s
