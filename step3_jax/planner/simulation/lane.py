"""The AFD pipeline as lanes, and the work of each.

Lanes of one layer: attention, the way to the FFN side, FFN, and the way back; m micro-batches go round.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Self

# An xAyF larger than this is a typo.
MAX_INSTANCES = 1024


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Lanes and links.

    Attributes:
      num_layers: L.
      num_microbatches: m.
      num_attention: Attention instances. Each works on its own rows of a micro-batch.
      num_ffn: FFN instances. Each needs the rows of all attention instances, and sends a part of the sum to all of them.
      latency_s: From the last byte sent to the last one received, each way; it occupies no lane.
      attention_bytes_s: Bandwidth of an attention instance's links, each way, shared by its flows; None if ways between two
        instances have fixed times and share nothing.
      ffn_bytes_s: Bandwidth of an FFN instance's links, like `attention_bytes_s`.
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
                f"{self.num_attention}A{self.num_ffn}F: at most {MAX_INSTANCES} instances per side can be simulated"
            )
        if self.latency_s < 0:
            raise ValueError(f"latency_s is {self.latency_s:g}; at least 0 is needed")
        if (self.attention_bytes_s is None) != (self.ffn_bytes_s is None):
            raise ValueError("links of one side have a bandwidth but those of the other do not: give both or neither")
        for name in ("attention_bytes_s", "ffn_bytes_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value:g}; more than 0 is needed")

    @property
    def is_shared(self) -> bool:
        """Whether ways are bytes on links that flows share."""
        return self.attention_bytes_s is not None

    @property
    def way_s(self) -> float:
        """Seconds of a way per unit of `Work.to_ffn` while all instances use their links equally.

        An attention instance has as many flows as there are FFN instances, all of equal size, and vice versa: the
        side with more flows per link sets the pace. If ways share nothing the unit is a second.
        """
        if self.attention_bytes_s is None or self.ffn_bytes_s is None:
            return 1.0
        return max(self.num_ffn / self.attention_bytes_s, self.num_attention / self.ffn_bytes_s)


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of a layer for each micro-batch, by micro-batch and then by instance.

    Attributes:
      attention_s: Seconds on each attention instance.
      ffn_s: Seconds on each FFN instance.
      to_ffn: From one attention to one FFN instance: bytes if links are shared, else seconds. By micro-batch.
      to_attention: The way back, like `to_ffn`.
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
        """Whether all instances of a side have the same work."""
        return all(len(set(row)) == 1 for table in (self.attention_s, self.ffn_s, self.growth_s) for row in table)

    def check(self, pipeline: Pipeline) -> None:
        """Raises ValueError if this is not work for the pipeline, or a time is negative or not a number."""
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
    """One instance of each side in place of many that all do the same at the same time; the times do not change.

    A way takes its time with all links equally used, see `Pipeline.way_s`. Exact while times are constant, as
    instances then never drift apart.

    Raises:
      ValueError: If instances have different work.
    """
    if not work.is_even:
        raise ValueError("instances of one side have different work: they cannot be folded into one")
    one = dataclasses.replace(pipeline, num_attention=1, num_ffn=1, attention_bytes_s=None, ffn_bytes_s=None)
    return one, dataclasses.replace(
        work,
        attention_s=tuple(row[:1] for row in work.attention_s),
        ffn_s=tuple(row[:1] for row in work.ffn_s),
        growth_s=tuple(row[:1] for row in work.growth_s),
        to_ffn=tuple(value * pipeline.way_s for value in work.to_ffn),
        to_attention=tuple(value * pipeline.way_s for value in work.to_attention),
    )
