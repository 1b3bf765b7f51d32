"""The pipeline's stages in schedule order, for ways between instances that share nothing.

Lanes and ways are first in, first out, so micro-batches never overtake each other, whatever the times are. Each
stage starts when its inputs have arrived and the previous stage on its lane has ended, and both are known when it is its
turn: these are exactly the times that an event queue would give, without one.
"""

from __future__ import annotations

from step3_jax.planner.simulation.jitter import Draws
from step3_jax.planner.simulation.lane import Pipeline, Work
from step3_jax.planner.simulation.run import Record, Run


def run_in_order(
    pipeline: Pipeline, work: Work, num_steps: int, draws: Draws, start_s: float, record: Record | None
) -> Run:
    """All stages in schedule order: each way between two instances is a lane that shares nothing."""
    latency_s = pipeline.latency_s
    attention, ffn = range(pipeline.num_attention), range(pipeline.num_ffn)
    attention_factor, ffn_factor = draws["attention"].__next__, draws["ffn"].__next__
    to_ffn_factor, to_attention_factor = draws["to_ffn"].__next__, draws["to_attention"].__next__
    attention_free = [start_s] * len(attention)
    ffn_free = [start_s] * len(ffn)
    # By FFN instance, then by attention instance.
    to_ffn_free = [[start_s] * len(attention) for _ in ffn]
    to_attention_free = [[start_s] * len(attention) for _ in ffn]
    # When the next inputs of a micro-batch are on each attention instance.
    ready = [[start_s] * len(attention) for _ in work.to_ffn]
    attention_busy, ffn_busy = [0.0] * len(attention), [0.0] * len(ffn)
    to_ffn_busy = to_attention_busy = 0.0
    tokens: list[list[float]] = []
    attention_now = [list(row) for row in work.attention_s]
    for step in range(num_steps):
        for layer in range(pipeline.num_layers):
            for index, arrived in enumerate(ready):
                to_ffn_s, to_attention_s = work.to_ffn[index], work.to_attention[index]
                own_s = attention_now[index]
                sent = []
                if step and not layer:
                    tokens.append(_end_step(arrived, attention_free, attention_busy, work.head_s[index]))
                    if record is not None:
                        record.add_head(step - 1, pipeline.num_layers, index, arrived[0], work.head_s[index])
                for one in attention:
                    begin, free = arrived[one], attention_free[one]
                    if free > begin:
                        begin = free
                    length = own_s[one] * attention_factor()
                    attention_free[one] = end = begin + length
                    attention_busy[one] += length
                    sent.append(end)
                    if record is not None and not one:
                        record.add("attention", step, layer, index, begin, end)
                # A micro-batch without rows on an instance still goes round: the schedule is fixed.
                back = [0.0] * len(attention)
                for other in ffn:
                    come, row = 0.0, to_ffn_free[other]
                    for one in attention:
                        begin, free = sent[one], row[one]
                        if free > begin:
                            begin = free
                        length = to_ffn_s * to_ffn_factor()
                        row[one] = end = begin + length
                        to_ffn_busy += length
                        if record is not None and not one and not other:
                            record.add("to_ffn", step, layer, index, begin, end)
                        if end > come:
                            come = end
                    come += latency_s
                    free = ffn_free[other]
                    if free > come:
                        come = free
                    length = work.ffn_s[index][other] * ffn_factor()
                    ffn_free[other] = done = come + length
                    ffn_busy[other] += length
                    if record is not None and not other:
                        record.add("ffn", step, layer, index, come, done)
                    row = to_attention_free[other]
                    for one in attention:
                        begin, free = done, row[one]
                        if free > begin:
                            begin = free
                        length = to_attention_s * to_attention_factor()
                        row[one] = end = begin + length
                        to_attention_busy += length
                        if record is not None and not one and not other:
                            record.add("to_attention", step, layer, index, begin, end)
                        if end > back[one]:
                            back[one] = end
                for one in attention:
                    arrived[one] = back[one] + latency_s
        _grow(attention_now, work)
    for index, arrived in enumerate(ready):
        tokens.append(_end_step(arrived, attention_free, attention_busy, work.head_s[index]))
        if record is not None:
            record.add_head(num_steps - 1, pipeline.num_layers, index, arrived[0], work.head_s[index])
    num_ways = len(attention) * len(ffn)
    num_items = num_steps * pipeline.num_layers * len(ready)
    return Run(
        tokens_s=[tokens[first : first + len(ready)] for first in range(0, len(tokens), len(ready))],
        start_s=start_s,
        end_s=max(max(row) for row in tokens[-len(ready) :]),
        attention_busy_s=attention_busy,
        ffn_busy_s=ffn_busy,
        to_ffn_busy_s=to_ffn_busy / num_ways,
        to_attention_busy_s=to_attention_busy / num_ways,
        num_events=num_items * (len(attention) + len(ffn) + 2 * num_ways),
        events=[],
    )


def _end_step(arrived: list[float], free: list[float], busy: list[float], head_s: float) -> list[float]:
    """Runs a micro-batch's head on each attention instance; leaves in `arrived` when its next layer may start there."""
    for one, time_s in enumerate(arrived):
        end = max(time_s, free[one]) + head_s
        if head_s:
            free[one] = end
            busy[one] += head_s
        else:
            end = time_s
        arrived[one] = end
    return arrived.copy()


def _grow(attention_now: list[list[float]], work: Work) -> None:
    for row, growth in zip(attention_now, work.growth_s, strict=True):
        for one, more in enumerate(growth):
            row[one] += more
