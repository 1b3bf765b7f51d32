"""The pipeline as a textbook would simulate it: a heap of events, and a queue before every lane. Slow but easy to read."""

from __future__ import annotations

import collections
import heapq

from step3_jax.planner.simulation.lane import Pipeline, Work

Job = tuple[int, int, int]
LaneName = tuple[str, int, int]


def run_textbook(pipeline: Pipeline, work: Work, num_steps: int) -> list[list[list[float]]]:
    """When each step of each micro-batch ended on each attention instance; links share nothing, times are constant."""
    attention, ffn = range(pipeline.num_attention), range(pipeline.num_ffn)
    queues: dict[LaneName, collections.deque[Job]] = collections.defaultdict(collections.deque)
    busy: set[LaneName] = set()
    heap: list[tuple[float, int, str, LaneName, Job]] = []
    counter = 0
    come: collections.Counter[tuple[str, int, Job]] = collections.Counter()
    ends: dict[tuple[int, int, int], float] = {}

    def note(time_s: float, kind: str, lane: LaneName, job: Job) -> None:
        nonlocal counter
        counter += 1
        heapq.heappush(heap, (time_s, counter, kind, lane, job))

    def length(lane: LaneName, job: Job) -> float:
        kind, one, _ = lane
        step, layer, index = job
        if kind == "attention":
            head_s = work.head_s[index] if step and not layer else 0.0
            layer_s = work.attention_s[index][one] + step * work.growth_s[index][one] if step < num_steps else 0.0
            return head_s + layer_s
        if kind == "ffn":
            return work.ffn_s[index][one]
        return work.to_ffn[index] if kind == "to_ffn" else work.to_attention[index]

    def start(now_s: float, lane: LaneName) -> None:
        if lane not in busy and queues[lane]:
            busy.add(lane)
            job = queues[lane].popleft()
            step, layer, index = job
            if lane[0] == "attention" and step and not layer:
                ends[step - 1, index, lane[1]] = now_s + work.head_s[index]
            note(now_s + length(lane, job), "end", lane, job)

    for index in range(pipeline.num_microbatches):
        for one in attention:
            note(0.0, "come", ("attention", one, 0), (0, 0, index))
    while heap:
        now_s, _, event, lane, job = heapq.heappop(heap)
        kind, one, other = lane
        step, layer, index = job
        if event == "come":
            queues[lane].append(job)
            start(now_s, lane)
            continue
        busy.discard(lane)
        if kind == "attention" and step < num_steps:
            for two in ffn:
                note(now_s, "come", ("to_ffn", one, two), job)
        elif kind == "ffn":
            for two in attention:
                note(now_s, "come", ("to_attention", two, one), job)
        elif kind == "to_ffn":
            come["ffn", other, job] += 1
            if come["ffn", other, job] == pipeline.num_attention:
                note(now_s + pipeline.latency_s, "come", ("ffn", other, 0), job)
        elif kind == "to_attention":
            come["attention", one, job] += 1
            if come["attention", one, job] == pipeline.num_ffn:
                following = (step, layer + 1) if layer + 1 < pipeline.num_layers else (step + 1, 0)
                note(now_s + pipeline.latency_s, "come", ("attention", one, 0), (*following, index))
        start(now_s, lane)
    return [
        [[ends[step, index, one] for one in attention] for index in range(pipeline.num_microbatches)]
        for step in range(num_steps)
    ]
