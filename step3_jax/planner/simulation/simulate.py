"""The AFD pipeline event by event: when each stage of each micro-batch and layer starts and ends on each instance.

A stage starts when its inputs have arrived and its lane is free. An FFN instance needs the rows of all attention instances,
an attention instance the parts of all FFN instances; lanes take micro-batches in the order of arrival.
"""

from __future__ import annotations

import dataclasses

from step3_jax.planner.simulation.heap_loop import run_shared
from step3_jax.planner.simulation.jitter import Draws
from step3_jax.planner.simulation.lane import Pipeline, Work, fold
from step3_jax.planner.simulation.order_loop import run_in_order
from step3_jax.planner.simulation.run import Record, Run
from step3_jax.timeline.event import Event


def simulate(
    pipeline: Pipeline,
    work: Work,
    num_steps: int,
    *,
    draws: Draws | None = None,
    start_s: float = 0.0,
    first_step: int = 0,
    phase: str = "decode",
    is_recorded: bool = False,
) -> Run:
    """Runs steps of all micro-batches from an empty pipeline until it is empty again.

    Args:
      pipeline: Lanes and links.
      work: The work of each layer.
      num_steps: Steps, each of all layers.
      draws: Factors of the stage times; all 1 if None.
      start_s: When the micro-batches start.
      first_step: Number of the first step, for `Run.events`.
      phase: Phase of `Run.events`.
      is_recorded: Whether to keep the stages.

    Raises:
      ValueError: If the work is not for this pipeline, or there is not at least one step.
    """
    work.check(pipeline)
    if num_steps < 1:
        raise ValueError(f"{num_steps} steps are requested; at least 1 is needed")
    draws = draws or Draws()
    num_attention, num_ffn = pipeline.num_attention, pipeline.num_ffn
    # A single pair of instances has one flow at a time in each direction, whatever the times are.
    if num_attention == num_ffn == 1 or (draws.is_constant and work.is_even):
        pipeline, work = fold(pipeline, work)
    record = Record(first_step, phase) if is_recorded else None
    loop = run_shared if pipeline.is_shared else run_in_order
    run = loop(pipeline, work, num_steps, draws, start_s, record)
    if record is not None:
        run.events = sorted(record.events, key=_end)
    if pipeline.num_attention != num_attention or pipeline.num_ffn != num_ffn:
        run = _unfold(run, num_attention, num_ffn)
    return run


def _unfold(run: Run, num_attention: int, num_ffn: int) -> Run:
    """The run of all instances, from that of one which represents them."""
    return dataclasses.replace(
        run,
        tokens_s=[[row * num_attention for row in step] for step in run.tokens_s],
        attention_busy_s=run.attention_busy_s * num_attention,
        ffn_busy_s=run.ffn_busy_s * num_ffn,
    )


def _end(event: Event) -> float:
    return event.end_s
