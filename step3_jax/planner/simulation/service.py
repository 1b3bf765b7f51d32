"""Runs requests through a deployment: the engine's steps in sequence, each a chunk of prompts and a decode call.

While a prompt is prefilled or a first token is awaited, a decode call generates one token; otherwise up to 32, or as many
as between two pieces of a stream. Tokens are delivered when a call has ended, and requests join
between calls. The rows of an attention device are spread evenly over micro-batches. A chunk goes through all layers, the
pipeline drains between calls, and the host costs nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from step3_jax.layout.admission import STEPS_PER_CALL
from step3_jax.planner.simulation.arrival import Arrivals
from step3_jax.planner.simulation.batch import EMPTY, Batcher, Rows
from step3_jax.planner.simulation.jitter import Draws
from step3_jax.planner.simulation.lane import Pipeline, Work
from step3_jax.planner.simulation.run import Run
from step3_jax.planner.simulation.scheduler import Request, Scheduler
from step3_jax.planner.simulation.simulate import simulate
from step3_jax.timeline.event import Event

# Stages to keep for a trace: viewers are slow with more.
MAX_KEPT_EVENTS = 50_000


@dataclasses.dataclass(frozen=True)
class CallLimits:
    """How long a decode call may be.

    Attributes:
      steps: Most tokens between two pieces of a stream.
      call_s: Longest call, in seconds, but at least one step. None for no limit, as in an engine of several processes, which
        measure different times but must choose the same.
    """

    steps: int = STEPS_PER_CALL
    call_s: float | None = None


@dataclasses.dataclass
class ServiceRun:
    """The outcome of the requests.

    Attributes:
      requests: All that ended, in the order of their ends.
      num_rejected: Requests rejected because too many were waiting.
      num_preemptions: How often a request lost its pages.
      num_truncated: Requests that filled the cache alone and ended early.
      end_s: When the last one ended.
      calling_s: Time in calls; the rest was idle.
      attention_busy_s: Busy time of the attention side, the mean of its instances.
      ffn_busy_s: Busy time of the FFN side.
      to_ffn_busy_s: Busy time of the ways there.
      to_attention_busy_s: Busy time of the ways back.
      num_steps: Decode steps.
      num_events: Stages.
      most_running: Requests in slots at a time.
      events: The first stages, if requested.
    """

    requests: list[Request] = dataclasses.field(default_factory=list)
    num_rejected: int = 0
    num_preemptions: int = 0
    num_truncated: int = 0
    end_s: float = 0.0
    calling_s: float = 0.0
    attention_busy_s: float = 0.0
    ffn_busy_s: float = 0.0
    to_ffn_busy_s: float = 0.0
    to_attention_busy_s: float = 0.0
    num_steps: int = 0
    num_events: int = 0
    most_running: int = 0
    events: list[Event] = dataclasses.field(default_factory=list)


class Service:
    """A deployment that serves a load."""

    def __init__(
        self,
        pipeline: Pipeline,
        batcher: Batcher,
        scheduler: Scheduler,
        *,
        limits: CallLimits | None = None,
        draws: Draws | None = None,
        is_recorded: bool = False,
    ) -> None:
        """Starts with nothing to do.

        Args:
          pipeline: Lanes and links; a batch is cut into at most its number of micro-batches.
          batcher: Turns batches into work for it.
          scheduler: Schedules the requests; its shards are the attention devices.
          limits: Limits of a decode call.
          draws: Factors of the stage times; all 1 if None.
          is_recorded: Whether to keep the first stages.
        """
        self._pipeline, self._batcher, self._scheduler = pipeline, batcher, scheduler
        self._limits = limits or CallLimits()
        self._draws = draws or Draws()
        self._is_recorded = is_recorded
        self._run = ServiceRun()
        self._now_s = 0.0
        self._step_s = 0.0

    def serve(self, arrivals: Arrivals) -> ServiceRun:
        """Serves a load until all of its requests have ended.

        Raises:
          ValueError: If a prompt is longer than the cache of an attention device.
        """
        for number, one in enumerate(arrivals.requests, start=1):
            if one.prompt_tokens > self._scheduler.shard_tokens:
                raise ValueError(
                    f"request {number}: a prompt of {one.prompt_tokens:,} tokens is longer than the KV cache of an "
                    f"attention device, {self._scheduler.shard_tokens:,} tokens; give shorter ones, or more cache"
                )
        coming = [
            Request(number, one.arrival_s or 0.0, one.prompt_tokens, one.output_tokens)
            for number, one in enumerate(arrivals.requests)
        ]
        coming.reverse()
        scheduler, run = self._scheduler, self._run
        while coming or scheduler.running or scheduler.num_waiting:
            self._take(coming, arrivals.concurrency)
            scheduler.admit(self._now_s)
            run.most_running = max(run.most_running, len(scheduler.running))
            chunk = scheduler.plan_chunk()
            if chunk:
                self._prefill(chunk)
            if any(one.is_ready for one in scheduler.running):
                self._decode()
            elif not chunk:
                if not coming:
                    break
                self._now_s = max(self._now_s, coming[-1].arrival_s)
        run.num_rejected, run.num_preemptions = scheduler.num_rejected, scheduler.num_preemptions
        run.end_s = self._now_s
        return run

    def _take(self, coming: list[Request], concurrency: int | None) -> None:
        """Queues arrived requests; in a closed loop, as many as have ended."""
        scheduler = self._scheduler
        while coming:
            if concurrency is None:
                if coming[-1].arrival_s > self._now_s:
                    return
            elif len(scheduler.running) + scheduler.num_waiting >= concurrency:
                return
            else:
                coming[-1].arrival_s = self._now_s
            scheduler.add(coming.pop())

    def _prefill(self, chunk: Sequence[tuple[Request, int]]) -> None:
        parts = self._num_parts(max(count for _, count in chunk))
        rows = [[EMPTY] * self._batcher.topology.num_attention_devices for _ in range(parts)]
        for request, count in chunk:
            shard = request.shard or 0
            for index, microbatch in enumerate(rows):
                # A later part attends to what an earlier one has written.
                own = count / parts
                mean = request.num_computed + (index + 0.5) * own
                had = microbatch[shard]
                microbatch[shard] = Rows(had.num_rows + own, had.context_tokens + own * mean)
            request.num_computed += count
        self._call(self._batcher.prefill(rows), 1, "prefill")

    def _decode(self) -> None:
        scheduler = self._scheduler
        num_steps, stuck = scheduler.make_room(self._choose_steps())
        for request in stuck:
            self._run.num_truncated += 1
            self._end(request)
        ready = [one for one in scheduler.running if one.is_ready]
        if not ready:
            return
        left = [one.num_output - one.num_generated for one in ready]
        # The call ends once all rows have ended, or with the first one if others wait for its slot.
        num_steps = min(num_steps, min(left) if scheduler.num_waiting else max(left))
        found = self._call(self._batcher.decode(self._cut(ready)), num_steps, "decode")
        self._step_s = (found.end_s - found.start_s) / num_steps
        self._run.num_steps += num_steps
        for request in ready:
            new = min(num_steps, request.num_output - request.num_generated)
            request.num_tokens += new
            request.num_computed += new
            if request.first_s is None:
                request.first_s = self._now_s
            if request.num_generated == request.num_output:
                self._end(request)

    def _choose_steps(self) -> int:
        scheduler = self._scheduler
        if scheduler.is_prefilling or any(not one.num_generated for one in scheduler.running if one.is_ready):
            return 1
        steps = min(STEPS_PER_CALL, self._limits.steps)
        if self._limits.call_s is None or self._step_s == 0:
            return steps
        return min(steps, max(1, int(self._limits.call_s / self._step_s)))

    def _cut(self, ready: Sequence[Request]) -> list[list[Rows]]:
        """The rows of each attention device, dealt to the micro-batches in turn."""
        num_devices = self._batcher.topology.num_attention_devices
        own: list[list[Request]] = [[] for _ in range(num_devices)]
        for request in ready:
            own[request.shard or 0].append(request)
        parts = self._num_parts(max(map(len, own)))
        return [
            [
                Rows(len(dealt), sum(request.num_tokens for request in dealt))
                for dealt in (requests[index::parts] for requests in own)
            ]
            for index in range(parts)
        ]

    def _num_parts(self, most: int) -> int:
        """Micro-batches of a call: at most as many as a device has rows."""
        return max(1, min(self._pipeline.num_microbatches, most))

    def _call(self, work: Work, num_steps: int, phase: str) -> Run:
        run = self._run
        pipeline = dataclasses.replace(self._pipeline, num_microbatches=len(work.to_ffn))
        found = simulate(
            pipeline,
            work,
            num_steps,
            draws=self._draws,
            start_s=self._now_s,
            first_step=run.num_steps,
            phase=phase,
            is_recorded=self._is_recorded and len(run.events) < MAX_KEPT_EVENTS,
        )
        self._now_s = found.end_s
        run.calling_s += found.end_s - found.start_s
        run.attention_busy_s += math.fsum(found.attention_busy_s) / len(found.attention_busy_s)
        run.ffn_busy_s += math.fsum(found.ffn_busy_s) / len(found.ffn_busy_s)
        run.to_ffn_busy_s += found.to_ffn_busy_s
        run.to_attention_busy_s += found.to_attention_busy_s
        run.num_events += found.num_events
        run.events += found.events
        return found

    def _end(self, request: Request) -> None:
        self._scheduler.release(request)
        request.end_s = self._now_s
        self._run.requests.append(request)
