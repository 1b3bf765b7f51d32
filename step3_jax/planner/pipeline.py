"""The AFD pipeline as lanes, what each has to do, and the closed forms of its speed.

Lanes of one layer: attention, the way to the FFN side, FFN, and the way back; m micro-batches go round. `simulate.py` runs
that event by event. The closed forms here say what must come out where all times are constant, each with the conditions
under which it is exact. They are those of arXiv 2507.19427, sections 5 to 7, and of the planners that came after it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Self

# An xAyF larger than this is a slip of the keyboard.
MAX_INSTANCES = 1024


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Lanes and links.

    Attributes:
      num_layers: L.
      num_microbatches: m.
      num_attention: Attention instances. Each works on its own rows of a micro-batch.
      num_ffn: FFN instances. Each needs the rows of all attention instances, and gives a part of the sum to all of them.
      latency_s: From the last byte sent to the last one received, each way; it keeps no lane busy.
      attention_bytes_s: Of an attention instance's links, each way, shared by its flows; None where ways between two
        instances take seconds of their own and share nothing.
      ffn_bytes_s: Of an FFN instance's links, as `attention_bytes_s`.
    """

    num_layers: int
    num_microbatches: int
    num_attention: int = 1
    num_ffn: int = 1
    latency_s: float = 0.0
    attention_bytes_s: float | None = None
    ffn_bytes_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_microbatches", "num_attention", "num_ffn"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; at least 1 is needed")
        if max(self.num_attention, self.num_ffn) > MAX_INSTANCES:
            raise ValueError(
                f"{self.num_attention}A{self.num_ffn}F: at most {MAX_INSTANCES} instances a side are simulated"
            )
        if self.latency_s < 0:
            raise ValueError(f"latency_s is {self.latency_s:g}; at least 0 is needed")
        if (self.attention_bytes_s is None) != (self.ffn_bytes_s is None):
            raise ValueError(
                "links of one side have a bandwidth and those of the other have none: give both or neither"
            )
        for name in ("attention_bytes_s", "ffn_bytes_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value:g}; more than 0 is needed")

    @property
    def is_shared(self) -> bool:
        """Whether ways are bytes on links that flows share."""
        return self.attention_bytes_s is not None


@dataclasses.dataclass(frozen=True)
class Work:
    """What a layer of each micro-batch takes, by micro-batch and then by instance.

    Attributes:
      attention_s: Seconds on each attention instance.
      ffn_s: Seconds on each FFN instance.
      to_ffn: From one attention to one FFN instance: bytes where links are shared, else seconds. By micro-batch.
      to_attention: The way back, as `to_ffn`.
      growth_s: By how much `attention_s` grows with each step, as contexts get longer.
      head_s: Seconds on each attention instance between two steps: head, sampling and embedding. By micro-batch.
    """

    attention_s: tuple[tuple[float, ...], ...]
    ffn_s: tuple[tuple[float, ...], ...]
    to_ffn: tuple[float, ...]
    to_attention: tuple[float, ...]
    growth_s: tuple[tuple[float, ...], ...]
    head_s: tuple[float, ...]

    @classmethod
    def constant(
        cls,
        pipeline: Pipeline,
        *,
        attention_s: float,
        ffn_s: float,
        to_ffn: float,
        to_attention: float,
        head_s: float = 0.0,
    ) -> Self:
        """The same for all micro-batches and instances, at every step."""
        count = pipeline.num_microbatches
        return cls(
            attention_s=((attention_s,) * pipeline.num_attention,) * count,
            ffn_s=((ffn_s,) * pipeline.num_ffn,) * count,
            to_ffn=(to_ffn,) * count,
            to_attention=(to_attention,) * count,
            growth_s=((0.0,) * pipeline.num_attention,) * count,
            head_s=(head_s,) * count,
        )

    @property
    def is_even(self) -> bool:
        """Whether instances of a side all have the same to do."""
        return all(len(set(row)) == 1 for table in (self.attention_s, self.ffn_s, self.growth_s) for row in table)

    def check(self, pipeline: Pipeline) -> None:
        """Raises ValueError if this is not work for a pipeline, or a time is negative or no number."""
        count = pipeline.num_microbatches
        tables = (
            ("attention_s", self.attention_s, pipeline.num_attention),
            ("growth_s", self.growth_s, pipeline.num_attention),
            ("ffn_s", self.ffn_s, pipeline.num_ffn),
        )
        for name, table, width in tables:
            if len(table) != count or any(len(row) != width for row in table):
                raise ValueError(f"{name} is not of {count} micro-batches on {width} instances")
        rows = (("to_ffn", self.to_ffn), ("to_attention", self.to_attention), ("head_s", self.head_s))
        for name, row in rows:
            if len(row) != count:
                raise ValueError(f"{name} has {len(row)} entries; {count} micro-batches are in flight")
        flat = [value for _, table, _ in tables for row in table for value in row] + [v for _, row in rows for v in row]
        if not all(math.isfinite(value) and value >= 0 for value in flat):
            raise ValueError("a stage takes a negative or unbounded time; each needs a number of at least 0")


def fold(pipeline: Pipeline, work: Work) -> tuple[Pipeline, Work]:
    """One instance of each side in place of many that all do the same at the same time; the times stay what they are.

    An attention instance has as many flows as there are FFN instances, all of one size, and the other way round: so
    the side with more of them to one link sets the pace, and a way takes as many seconds as its whole micro-batch on
    that link. Exact while times are constant, as instances then never drift apart.

    Raises:
      ValueError: If instances have different work.
    """
    if not work.is_even:
        raise ValueError("instances of one side have different work: they cannot be folded into one")
    seconds_a_byte = 1.0
    if pipeline.attention_bytes_s is not None and pipeline.ffn_bytes_s is not None:
        seconds_a_byte = max(
            pipeline.num_ffn / pipeline.attention_bytes_s, pipeline.num_attention / pipeline.ffn_bytes_s
        )
    one = dataclasses.replace(pipeline, num_attention=1, num_ffn=1, attention_bytes_s=None, ffn_bytes_s=None)
    return one, dataclasses.replace(
        work,
        attention_s=tuple(row[:1] for row in work.attention_s),
        ffn_s=tuple(row[:1] for row in work.ffn_s),
        growth_s=tuple(row[:1] for row in work.growth_s),
        to_ffn=tuple(value * seconds_a_byte for value in work.to_ffn),
        to_attention=tuple(value * seconds_a_byte for value in work.to_attention),
    )


@dataclasses.dataclass(frozen=True)
class Stages:
    """Constant times of the four stages of a layer of one micro-batch, in seconds.

    Attributes:
      attention_s: t_A.
      to_ffn_s: t_A2F.
      ffn_s: t_F.
      to_attention_s: t_F2A.
      latency_s: Of each way, beside its time.
    """

    attention_s: float
    to_ffn_s: float
    ffn_s: float
    to_attention_s: float
    latency_s: float = 0.0

    @property
    def longest_s(self) -> float:
        """Of the lane that binds."""
        return max(self.attention_s, self.to_ffn_s, self.ffn_s, self.to_attention_s)

    @property
    def around_s(self) -> float:
        """Of one micro-batch alone: its way through all lanes and back."""
        return self.attention_s + self.to_ffn_s + self.ffn_s + self.to_attention_s + 2 * self.latency_s


def layer_s(stages: Stages, num_microbatches: int) -> float:
    """Seconds of a layer of all micro-batches in the steady state: max(m t_max, t_A + t_A2F + t_F + t_F2A).

    Exact for constant times and m equal micro-batches that go round as soon as a lane is free, whose head takes nothing.
    With m = 3 and no lane idle this is `TPOT = L m max(t_A, t_F, t_comm)` of the report; see `has_no_bubble`.
    """
    return max(num_microbatches * stages.longest_s, stages.around_s)


def step_s(stages: Stages, num_layers: int, num_microbatches: int, head_s: float = 0.0) -> float:
    """Seconds of a step, the time per output token, in the steady state: L layers and the head.

    L times `layer_s` without a head. With one, exact with one micro-batch or where attention is the lane that
    binds and never waits inside a step; a lower bound else.
    """
    attention_s = num_layers * stages.attention_s + head_s
    return max(
        num_layers * layer_s(stages, num_microbatches),
        num_microbatches * attention_s,
        num_layers * stages.around_s + head_s,
    )


def has_no_bubble(stages: Stages, num_microbatches: int) -> bool:
    """Whether attention never waits: t_A2F + t_F + t_F2A <= (m - 1) t_A, and no other lane takes longer than it."""
    others = stages.around_s - stages.attention_s
    return stages.longest_s <= stages.attention_s and others <= (num_microbatches - 1) * stages.attention_s


def lockstep_tick_s(stages: Stages, num_microbatches: int, *, is_exchange_on_core: bool = False) -> float:
    """Seconds of a tick where both sides go in step, one exchange a tick carrying both directions (`layout` `Schedule`).

    The exchange takes t_X = max(t_A2F, t_F2A) + latency. By the number of micro-batches: 1, where a layer is two ticks of
    which each side works in one, (t_A + t_F) / 2 + t_X; 2: max(t_A, t_F) + t_X, which with separate ways is the
    max(t_A + t_A2F, t_F + t_F2A) of ai-dynamo's planner; 3: max(t_A, t_F + t_X), as what attention sends runs beside its
    work; 4: max(t_A, t_F, t_X), as both do. Exact for constant times.

    Args:
      stages: Times.
      num_microbatches: 1 to 4.
      is_exchange_on_core: Whether the exchange takes the time of the cores that compute, as gloo does on a CPU: then with 2
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
    """Longest that a stage may take: (TPOT accepted - gap) / (m L).

    The report's 50 ms with three micro-batches and 61 layers are 273 us; arXiv 2602.09721 adds tokens accepted a step and
    the gap between steps. Where a gap is m heads it is the inverse of `step_s` with attention binding.
    """
    return (tpot_s * accepted - gap_s) / (num_microbatches * num_layers)


def best_ratio(*, attention_s: float, way_s: float, ffn_row_s: float, ffn_fixed_s: float, rows: int) -> float:
    """Attention instances for each FFN instance that give the most tokens per instance, as a real number.

    With t_F = a_F r B + b_F the FFN side binds above max((t_A - b_F), (t_C - b_F)) / (a_F B); the best is there, or at
    sqrt(b_F / (a_F B)) if that is larger (arXiv 2601.21351). Exact where enough micro-batches leave no bubble.

    Args:
      attention_s: t_A of B rows.
      way_s: t_C, the longer way.
      ffn_row_s: a_F.
      ffn_fixed_s: b_F.
      rows: B, rows of an attention instance in a micro-batch.
    """
    slope_s = ffn_row_s * rows
    return max((attention_s - ffn_fixed_s) / slope_s, (way_s - ffn_fixed_s) / slope_s, math.sqrt(ffn_fixed_s / slope_s))
