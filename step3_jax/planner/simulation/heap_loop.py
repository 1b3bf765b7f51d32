"""The pipeline's stages from a heap of events, where flows share the links between instances (`link.py`)."""

from __future__ import annotations

import heapq
import math

from step3_jax.planner.simulation.jitter import Draws
from step3_jax.planner.simulation.lane import Pipeline, Work
from step3_jax.planner.simulation.link import SharedLinks
from step3_jax.planner.simulation.run import Record, Run

# What an entry of the heap means; at equal times they come in this order.
_ATTENTION_ENDS, _FFN_ENDS, _COMES_TO_FFN, _COMES_BACK = range(4)


def run_shared(
    pipeline: Pipeline, work: Work, num_steps: int, draws: Draws, start_s: float, record: Record | None
) -> Run:
    """StageTimes from a heap, flows from the links that they share."""
    assert pipeline.attention_bytes_s is not None
    assert pipeline.ffn_bytes_s is not None
    num_attention, num_ffn, num_layers = pipeline.num_attention, pipeline.num_ffn, pipeline.num_layers
    latency_s, count = pipeline.latency_s, pipeline.num_microbatches
    attention_factor, ffn_factor = draws["attention"].__next__, draws["ffn"].__next__
    to_ffn_factor, to_attention_factor = draws["to_ffn"].__next__, draws["to_attention"].__next__
    there, back = (
        SharedLinks(num_attention, num_ffn, pipeline.attention_bytes_s, pipeline.ffn_bytes_s) for _ in range(2)
    )
    attention_free, ffn_free = [start_s] * num_attention, [start_s] * num_ffn
    attention_busy, ffn_busy = [0.0] * num_attention, [0.0] * num_ffn
    missing_rows = [[num_attention] * count for _ in range(num_ffn)]
    missing_parts = [[num_ffn] * count for _ in range(num_attention)]
    # Layers, of all steps, that each micro-batch has behind it on each attention instance.
    done = [[0] * count for _ in range(num_attention)]
    tokens = [[[0.0] * num_attention for _ in range(count)] for _ in range(num_steps)]
    heap: list[tuple[float, int, int, int, int]] = []
    push, pop = heapq.heappush, heapq.heappop

    def attend(now_s: float, one: int, index: int) -> None:
        """Starts the next layer's attention of a micro-batch whose parts have come, and before a new step the head."""
        step, layer = divmod(done[one][index], num_layers)
        begin = attention_free[one] if attention_free[one] > now_s else now_s
        if step and not layer:
            head_s = work.head_s[index]
            tokens[step - 1][index][one] = begin + head_s if head_s else now_s
            begin += head_s
            attention_busy[one] += head_s
            if record is not None and not one:
                record.add_head(step - 1, num_layers, index, begin, head_s)
            if head_s:
                attention_free[one] = begin
            if step == num_steps:
                return
        length = (work.attention_s[index][one] + step * work.growth_s[index][one]) * attention_factor()
        attention_free[one] = end = begin + length
        attention_busy[one] += length
        if record is not None and not one:
            record.add("attention", step, layer, index, begin, end)
        push(heap, (end, _ATTENTION_ENDS, one, 0, index))

    for index in range(count):
        for one in range(num_attention):
            attend(start_s, one, index)
    now_s = start_s
    while True:
        if not heap or heap[0][0] > now_s:
            # All that starts now has started.
            if there.is_stale:
                there.refresh(now_s)
            if back.is_stale:
                back.refresh(now_s)
            flow_s = min(there.next_s, back.next_s)
            if not heap and flow_s == math.inf:
                break
            if not heap or flow_s < heap[0][0]:
                now_s = flow_s
                if there.next_s <= flow_s:
                    for flow in there.take():
                        push(heap, (flow_s + latency_s, _COMES_TO_FFN, flow.ffn, flow.attention, flow.tag))
                        if record is not None and not flow.attention and not flow.ffn:
                            step, layer = divmod(done[0][flow.tag], num_layers)
                            record.add("to_ffn", step, layer, flow.tag, flow.start_s, flow_s)
                if back.next_s <= flow_s:
                    for flow in back.take():
                        push(heap, (flow_s + latency_s, _COMES_BACK, flow.attention, flow.ffn, flow.tag))
                        if record is not None and not flow.attention and not flow.ffn:
                            step, layer = divmod(done[0][flow.tag], num_layers)
                            record.add("to_attention", step, layer, flow.tag, flow.start_s, flow_s)
                continue
        now_s, kind, one, other, index = pop(heap)
        if kind == _COMES_TO_FFN:
            missing_rows[one][index] -= 1
            if missing_rows[one][index]:
                continue
            missing_rows[one][index] = num_attention
            begin = ffn_free[one] if ffn_free[one] > now_s else now_s
            length = work.ffn_s[index][one] * ffn_factor()
            ffn_free[one] = end = begin + length
            ffn_busy[one] += length
            if record is not None and not one:
                step, layer = divmod(done[0][index], num_layers)
                record.add("ffn", step, layer, index, begin, end)
            push(heap, (end, _FFN_ENDS, one, 0, index))
        elif kind == _COMES_BACK:
            missing_parts[one][index] -= 1
            if missing_parts[one][index]:
                continue
            missing_parts[one][index] = num_ffn
            done[one][index] += 1
            attend(now_s, one, index)
        elif kind == _ATTENTION_ENDS:
            num_bytes = work.to_ffn[index]
            for other in range(num_ffn):
                there.start(now_s, one, other, num_bytes * to_ffn_factor(), index)
        else:
            num_bytes = work.to_attention[index]
            for other in range(num_attention):
                back.start(now_s, other, one, num_bytes * to_attention_factor(), index)
    num_items = num_steps * num_layers * count
    return Run(
        tokens_s=tokens,
        start_s=start_s,
        end_s=max(max(row) for row in tokens[-1]),
        attention_busy_s=attention_busy,
        ffn_busy_s=ffn_busy,
        to_ffn_busy_s=sum(there.busy_s) / num_attention,
        to_attention_busy_s=sum(back.busy_s) / num_attention,
        num_events=num_items * (num_attention + num_ffn + 2 * num_attention * num_ffn),
        events=[],
    )
