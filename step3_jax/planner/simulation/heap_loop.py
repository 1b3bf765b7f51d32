"""The pipeline's stages from a heap of events, for flows that share the links between instances (`link.py`)."""

from __future__ import annotations

import heapq
import math

from step3_jax.planner.simulation.jitter import Draws
from step3_jax.planner.simulation.lane import Pipeline, Work
from step3_jax.planner.simulation.link import SharedLinks
from step3_jax.planner.simulation.run import Record, Run

# Kinds of heap entries; at equal times they come in this order.
_ATTENTION_ENDS, _FFN_ENDS = range(2)


def run_shared(
    pipeline: Pipeline, work: Work, num_steps: int, draws: Draws, start_s: float, record: Record | None
) -> Run:
    """Simulates steps of all micro-batches.

    Args:
      pipeline: A pipeline with bandwidths for both sides' links.
      work: The work of each layer, ways in bytes.
      num_steps: Steps, each of all layers.
      draws: Factors of the stage times; one for everything that an instance sends of a micro-batch.
      start_s: When the micro-batches start.
      record: Keeps the stages; None for none.
    """
    assert pipeline.attention_bytes_s is not None
    assert pipeline.ffn_bytes_s is not None
    num_attention, num_ffn, num_layers = pipeline.num_attention, pipeline.num_ffn, pipeline.num_layers
    latency_s, count = pipeline.latency_s, pipeline.num_microbatches
    attention_factor, ffn_factor = draws["attention"].__next__, draws["ffn"].__next__
    to_ffn_factor, to_attention_factor = draws["to_ffn"].__next__, draws["to_attention"].__next__
    there = SharedLinks(num_attention, num_ffn, pipeline.attention_bytes_s, pipeline.ffn_bytes_s)
    back = SharedLinks(num_ffn, num_attention, pipeline.ffn_bytes_s, pipeline.attention_bytes_s)
    attention_free, ffn_free = [start_s] * num_attention, [start_s] * num_ffn
    attention_busy, ffn_busy = [0.0] * num_attention, [0.0] * num_ffn
    # For each micro-batch, how many attention instances' rows, and FFN instances' parts, are still missing; all instances of
    # the other side get them at once.
    missing_rows, missing_parts = [num_attention] * count, [num_ffn] * count
    # Layers, over all steps, that each micro-batch has completed.
    done = [0] * count
    tokens = [[[0.0] * num_attention for _ in range(count)] for _ in range(num_steps)]
    heap: list[tuple[float, int, int, int]] = []
    push, pop = heapq.heappush, heapq.heappop

    def attend(now_s: float, index: int) -> None:
        """Starts the next layer's attention of a micro-batch whose parts have arrived, with the head before a new step."""
        step, layer = divmod(done[index], num_layers)
        for one, free in enumerate(attention_free):
            begin = free if free > now_s else now_s
            if step and not layer:
                head_s = work.head_s[index]
                tokens[step - 1][index][one] = begin + head_s if head_s else now_s
                begin += head_s
                attention_busy[one] += head_s
                if record is not None and not one:
                    record.add_head(step - 1, num_layers, index, begin, head_s)
                if step == num_steps:
                    attention_free[one] = begin if head_s else free
                    continue
            length = (work.attention_s[index][one] + step * work.growth_s[index][one]) * attention_factor()
            attention_free[one] = end = begin + length
            attention_busy[one] += length
            if record is not None and not one:
                record.add("attention", step, layer, index, begin, end)
            push(heap, (end, _ATTENTION_ENDS, one, index))

    for index in range(count):
        attend(start_s, index)
    while True:
        now_s = heap[0][0] if heap else math.inf
        if there.next_s <= now_s and there.next_s <= back.next_s:
            now_s = there.next_s
            if now_s == math.inf:
                break
            for source, index, sent_s in there.take():
                if record is not None and not source:
                    record.add("to_ffn", *divmod(done[index], num_layers), index, sent_s, now_s)
                missing_rows[index] -= 1
                if missing_rows[index]:
                    continue
                missing_rows[index] = num_attention
                come = now_s + latency_s
                for one, free in enumerate(ffn_free):
                    begin = free if free > come else come
                    length = work.ffn_s[index][one] * ffn_factor()
                    ffn_free[one] = end = begin + length
                    ffn_busy[one] += length
                    if record is not None and not one:
                        record.add("ffn", *divmod(done[index], num_layers), index, begin, end)
                    push(heap, (end, _FFN_ENDS, one, index))
        elif back.next_s <= now_s:
            now_s = back.next_s
            for source, index, sent_s in back.take():
                if record is not None and not source:
                    record.add("to_attention", *divmod(done[index], num_layers), index, sent_s, now_s)
                missing_parts[index] -= 1
                if missing_parts[index]:
                    continue
                missing_parts[index] = num_ffn
                done[index] += 1
                attend(now_s + latency_s, index)
        else:
            now_s, kind, one, index = pop(heap)
            if kind == _ATTENTION_ENDS:
                there.start(now_s, one, work.to_ffn[index] * to_ffn_factor(), index)
            else:
                back.start(now_s, one, work.to_attention[index] * to_attention_factor(), index)
    num_items = num_steps * num_layers * count
    return Run(
        tokens_s=tokens,
        start_s=start_s,
        end_s=max(max(row) for row in tokens[-1]),
        attention_busy_s=attention_busy,
        ffn_busy_s=ffn_busy,
        to_ffn_busy_s=math.fsum(there.source_busy_s) / num_attention,
        to_attention_busy_s=back.busy_s,
        num_events=num_items * (num_attention + num_ffn + 2 * num_attention * num_ffn),
        events=[],
    )
