"""Turns the sequences of attention devices into the work of a pipeline: rows and cached tokens, cut into micro-batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from step3_jax.layout.deployment import Topology
from step3_jax.planner.simulation.lane import Work
from step3_jax.planner.simulation.stage_time import StageTimer


class Rows(NamedTuple):
    """A device's part of a micro-batch.

    Attributes:
      num_rows: Sequences of a decode step, or tokens of a chunk of prompts.
      context_tokens: Tokens that all of them attend to, together.
    """

    num_rows: float
    context_tokens: float

    @property
    def mean_context(self) -> float:
        """Mean context of one of them."""
        return self.context_tokens / self.num_rows if self.num_rows else 0.0


EMPTY = Rows(0, 0)


@dataclasses.dataclass(frozen=True)
class Batcher:
    """Turns batches into work.

    Attributes:
      topology: Instances and their devices.
      timer: Seconds of the stages.
      head_s: Time of the head, between two steps, on the attention side.
    """

    topology: Topology
    timer: StageTimer
    head_s: float = 0.0

    def decode(self, rows: Sequence[Sequence[Rows]], *, is_growing: bool = True) -> Work:
        """Work of decode steps.

        Args:
          rows: By micro-batch and attention device, the instances' devices in sequence.
          is_growing: Whether contexts get longer with each step; they do not where ended sequences are replaced.
        """
        timer = self.timer
        attention, growth = [], []
        for microbatch in rows:
            slowest = [
                max(part, key=lambda one: timer.attention_s(one.num_rows, one.mean_context))
                for part in self._instances(microbatch)
            ]
            now = [timer.attention_s(one.num_rows, one.mean_context) for one in slowest]
            # One step later each row attends to one more token.
            later = [timer.attention_s(one.num_rows, one.mean_context + 1) for one in slowest] if is_growing else now
            attention.append(tuple(now))
            growth.append(tuple(after - before for before, after in zip(now, later, strict=True)))
        return self._build(rows, attention, growth, self.head_s)

    def prefill(self, rows: Sequence[Sequence[Rows]]) -> Work:
        """Work of a chunk of prompts.

        Args:
          rows: As for `decode`, in tokens.
        """
        attention = [
            tuple(
                max(self.timer.prefill_s(one.num_rows, one.mean_context) for one in part)
                for part in self._instances(microbatch)
            )
            for microbatch in rows
        ]
        growth = [(0.0,) * self.topology.num_attention] * len(rows)
        return self._build(rows, attention, growth, 0.0)

    def _build(
        self,
        rows: Sequence[Sequence[Rows]],
        attention: Sequence[tuple[float, ...]],
        growth: Sequence[tuple[float, ...]],
        head_s: float,
    ) -> Work:
        ffn, to_ffn, to_attention = [], [], []
        for microbatch in rows:
            ffn.append((self.timer.ffn_s(sum(one.num_rows for one in microbatch)),) * self.topology.num_ffn)
            # The instance that sends most: the exchange has slots of equal size.
            most = max(sum(one.num_rows for one in part) for part in self._instances(microbatch))
            there, back = self.timer.way(most)
            to_ffn.append(there)
            to_attention.append(back)
        return Work(
            attention_s=tuple(attention),
            ffn_s=tuple(ffn),
            to_ffn=tuple(to_ffn),
            to_attention=tuple(to_attention),
            growth_s=tuple(growth),
            head_s=tuple(head_s if any(one.num_rows for one in microbatch) else 0.0 for microbatch in rows),
        )

    def _instances(self, devices: Sequence[Rows]) -> list[Sequence[Rows]]:
        each = self.topology.devices_per_instance
        return [devices[first : first + each] for first in range(0, len(devices), each)]


def spread_evenly(
    topology: Topology, num_microbatches: int, num_sequences: int, context_tokens: float
) -> list[list[Rows]]:
    """A batch of equal contexts, spread over micro-batches and attention devices as evenly as possible.

    Raises:
      ValueError: If there are fewer sequences than micro-batches.
    """
    if num_sequences < num_microbatches:
        raise ValueError(
            f"a batch of {num_sequences} cannot be cut into {num_microbatches} micro-batches: give at least as many "
            "sequences, or fewer micro-batches"
        )
    devices = topology.num_attention_devices
    parts = num_microbatches * devices
    counts = [num_sequences // parts + (index < num_sequences % parts) for index in range(parts)]
    # The first micro-batches, and in them the first devices, have the remaining sequences.
    return [
        [Rows(counts[index * devices + one], counts[index * devices + one] * context_tokens) for one in range(devices)]
        for index in range(num_microbatches)
    ]
