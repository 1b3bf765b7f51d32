"""The pipeline of executor `program`, tick by tick: both sides compute an item, then one exchange carries both directions.

`layout/schedule.py` says which side computes what in which tick. A side that sends the previous tick's result
does so while it computes; on a CPU the exchange takes time from that computing, on a GPU it does not.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

from step3_jax.layout.schedule import Item, Schedule
from step3_jax.planner.simulation.closed_form import StageTimes
from step3_jax.planner.simulation.jitter import Draws, Jitter
from step3_jax.planner.simulation.run import Record, Run
from step3_jax.timeline.event import Event, Lane


def simulate_lockstep(
    schedule: Schedule,
    stages: StageTimes,
    num_steps: int,
    *,
    draws: Draws | None = None,
    head_s: float = 0.0,
    is_exchange_on_core: bool = False,
    is_recorded: bool = False,
) -> Run:
    """Runs decode steps of one attention and one FFN instance.

    Args:
      schedule: Layers and micro-batches.
      stages: Mean times. The exchange takes the longer of the two ways, and the latency.
      num_steps: Steps, each of all layers of all micro-batches.
      draws: Factors of the stage times; those of `to_ffn` apply to the exchange. All 1 if None.
      head_s: Time that a micro-batch's head adds to its first attention item of a step.
      is_exchange_on_core: Whether an exchange that overlaps with a side's work takes time from that work.
      is_recorded: Whether to keep the stages; an exchange is kept as the two ways that it carries.

    Raises:
      ValueError: If there is not at least one step.
    """
    if num_steps < 1:
        raise ValueError(f"{num_steps} steps are requested; at least 1 is needed")
    draws = draws or Draws()
    attention_factor, ffn_factor = draws["attention"].__next__, draws["ffn"].__next__
    exchange_factor = draws["to_ffn"].__next__
    mean_exchange_s = max(stages.to_ffn_s, stages.to_attention_s) + stages.latency_s
    attention_lag, ffn_lag = schedule.attention_lag, schedule.ffn_lag
    attention_end = ffn_end = exchange_end = 0.0
    attention_busy = ffn_busy = exchange_busy = 0.0
    ends: list[float] = []
    record = Record(0, "decode") if is_recorded else None
    num_ticks = num_steps * schedule.num_ticks + schedule.num_last_exchanges
    for number in range(num_ticks):
        tick = number % schedule.num_ticks
        attention_before, ffn_before, begin = attention_end, ffn_end, exchange_end
        step = number // schedule.num_ticks
        # After the last step the FFN side computes what is still in flight, and attention nothing.
        item = schedule.attention_item(tick) if step < num_steps else None
        ffn_item = schedule.ffn_item(tick) if step < num_steps or schedule.is_from_before(tick) else None
        attention_s = 0.0
        if item is not None:
            attention_s = stages.attention_s * attention_factor() + (0.0 if item.layer else head_s)
        attention_end = max(attention_before, begin) + attention_s
        ffn_s = stages.ffn_s * ffn_factor() if ffn_item is not None else 0.0
        ffn_end = max(ffn_before, begin) + ffn_s
        exchange_s = mean_exchange_s * exchange_factor()
        sent = max(attention_before if attention_lag else attention_end, ffn_before if ffn_lag else ffn_end, begin)
        if is_exchange_on_core:
            if attention_lag and sent < attention_end:
                attention_end += exchange_s
            if ffn_lag and sent < ffn_end:
                ffn_end += exchange_s
        exchange_end = sent + exchange_s
        ends.append(exchange_end)
        if record is not None:
            # What a rotation's first ticks compute and send for others belongs to the previous step.
            record_item = functools.partial(_keep, record, num_steps)
            record_item("attention", item, step, max(attention_before, begin), attention_end)
            record_item("ffn", ffn_item, step - schedule.is_from_before(tick), max(ffn_before, begin), ffn_end)
            ways: tuple[tuple[Lane, int], ...] = (
                ("to_ffn", attention_lag),
                ("to_attention", 1 + attention_lag + ffn_lag),
            )
            for lane, lag in ways:
                sent_item = schedule.attention_item((tick - lag) % schedule.num_ticks)
                record_item(lane, sent_item, step - (tick < lag), sent, exchange_end)
        attention_busy += attention_s
        ffn_busy += ffn_s
        exchange_busy += exchange_s
    # A step of a micro-batch ends when its last layer has come back.
    first = (schedule.num_layers - 1) * schedule.period + schedule.depth - 1
    return Run(
        tokens_s=[
            [[ends[step * schedule.num_ticks + first + index]] for index in range(schedule.num_microbatches)]
            for step in range(num_steps)
        ],
        start_s=0.0,
        end_s=ends[-1],
        attention_busy_s=[attention_busy],
        ffn_busy_s=[ffn_busy],
        to_ffn_busy_s=exchange_busy,
        to_attention_busy_s=exchange_busy,
        num_events=3 * num_ticks,
        events=[] if record is None else sorted(record.events, key=_end),
    )


def simulate_item_s(
    schedule: Schedule,
    *,
    attention_s: Sequence[float],
    ffn_s: Sequence[float],
    exchange_s: Sequence[float],
    num_steps: int = 300,
) -> float:
    """Mean seconds of a layer of one micro-batch from times measured on CPUs, whose cores do the exchange.

    Args:
      schedule: Layers and micro-batches.
      attention_s: Times of attention's items alone, all equally likely.
      ffn_s: The same for the FFN side.
      exchange_s: The same for exchanges alone.
      num_steps: Steps to simulate.
    """
    stages = StageTimes(*(math.fsum(times) / len(times) for times in (attention_s, exchange_s, ffn_s, exchange_s)))
    draws = Draws(
        {
            "attention": Jitter(samples=tuple(attention_s)),
            "ffn": Jitter(samples=tuple(ffn_s)),
            "to_ffn": Jitter(samples=tuple(exchange_s)),
        }
    )
    ends = simulate_lockstep(schedule, stages, num_steps, draws=draws, is_exchange_on_core=True).step_ends_s()
    return (ends[-2] - ends[0]) / (num_steps - 2) / (schedule.num_layers * schedule.num_microbatches)


def _keep(record: Record, num_steps: int, lane: Lane, item: Item | None, step: int, begin: float, end: float) -> None:
    """Keeps a stage of a step; the ticks before the first step's items and after the last one's are idle."""
    if item is not None and 0 <= step < num_steps:
        record.add(lane, step, item.layer, item.microbatch, begin, end)


def _end(event: Event) -> float:
    return event.end_s
