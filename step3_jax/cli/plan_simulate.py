"""`step3 plan simulate`: simulates a deployment with attention and FFN on separate devices, event by event.

Exit code 0, or 2 for a usage error.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from step3_jax.cli.display import write_note
from step3_jax.cli.simulate_load import count_cache_tokens, read_arrivals, read_scheduler
from step3_jax.cli.simulate_option import Case, read_case
from step3_jax.layout.schedule import Schedule
from step3_jax.planner.simulation.batch import Batcher, spread_evenly
from step3_jax.planner.simulation.closed_form import StageTimes, step_s
from step3_jax.planner.simulation.lane import Work
from step3_jax.planner.simulation.lockstep import simulate_lockstep
from step3_jax.planner.simulation.run import Run
from step3_jax.planner.simulation.service import Service
from step3_jax.planner.simulation.simulate import simulate
from step3_jax.planner.simulation.summary import Summary, summarise_batch, summarise_service, to_dict, to_lines
from step3_jax.timeline.event import Event
from step3_jax.timeline.picture import write_picture
from step3_jax.timeline.trace import write_trace

DEFAULT_STEPS = 32
_OF_REQUESTS = (
    "requests",
    "rate",
    "concurrency",
    "num_requests",
    "prompt_tokens",
    "output_tokens",
    "kv_cache_tokens",
    "max_num_seqs",
    "max_num_batched_tokens",
    "long_prefill_token_threshold",
    "max_num_queued_reqs",
    "stream_interval",
    "max_call_ms",
)
_OF_BATCH = ("batch", "steps")


def run(arguments: argparse.Namespace) -> int:
    """Prints the result."""
    has_requests = arguments.decode_only or any(getattr(arguments, name) is not None for name in _OF_REQUESTS)
    for name in _OF_BATCH:
        if has_requests and getattr(arguments, name) is not None:
            raise ValueError(
                f"--{name} is for a batch that stays full, but requests come and go: leave one of them out"
            )
    if arguments.exchange_on_core and not arguments.lockstep:
        raise ValueError("--exchange-on-core is a kind of lockstep: add --lockstep")
    case = read_case(arguments)
    is_recorded = bool(arguments.trace or arguments.picture)
    if has_requests:
        summary, values, lines, events = _run_requests(arguments, case, is_recorded)
    else:
        summary, values, lines, events = _run_batch(arguments, case, is_recorded)
    topology = case.topology
    head = (
        f"{topology.num_attention}A{topology.num_ffn}F, {topology.num_devices} devices, "
        f"{case.deployment.num_microbatches} micro-batches; {case.shape.printed_name}"
    )
    if arguments.trace:
        write_trace(arguments.trace, events)
        write_note(f"trace: {arguments.trace} (open it at ui.perfetto.dev)")
    if arguments.picture:
        write_picture(arguments.picture, events, title=f"Simulated {head}")
        write_note(f"picture: {arguments.picture}")
    if arguments.json:
        common = {
            "deployment": case.deployment.name,
            "model": case.shape.name,
            "devices": topology.num_devices,
            "microbatches": case.deployment.num_microbatches,
            "seed": arguments.seed,
            "times_from": list(case.notes),
            "measured_on_gpu_by_this_project": False,
        }
        print(json.dumps(common | values | to_dict(summary)))
        return 0
    print("\n".join([head, *lines, *case.notes, "", *to_lines(summary)]))
    print("simulated from the times above: nothing of this was measured on GPUs by this project")
    return 0


Outcome = tuple[Summary, dict[str, object], list[str], Sequence[Event]]


def _run_batch(arguments: argparse.Namespace, case: Case, is_recorded: bool) -> Outcome:
    workload = case.deployment.workload
    num_sequences = arguments.batch if arguments.batch is not None else workload.sequences if workload else None
    steps = DEFAULT_STEPS if arguments.steps is None else arguments.steps
    if num_sequences is None or case.context_tokens is None:
        raise ValueError("the deployment names no workload: give --batch and --context, or requests")
    for name, value, least in (("--batch", num_sequences, 1), ("--steps", steps, 3)):
        if value < least:
            raise ValueError(f"{name} {value}: at least {least} is needed")
    count = case.deployment.num_microbatches
    rows = spread_evenly(case.topology, count, num_sequences, case.context_tokens)
    work = Batcher(case.topology, case.timer, case.head_s).decode(rows, is_growing=False)
    if arguments.lockstep:
        found = _run_lockstep(arguments, case, work, steps, is_recorded)
    else:
        found = simulate(case.pipeline, work, steps, draws=case.draws, is_recorded=is_recorded)
    stages = _first_stages(case, work)
    lines = [
        f"{num_sequences:,} sequences of {case.context_tokens:,} tokens, {steps} steps",
        f"us a layer of a micro-batch: attention {stages.attention_s * 1e6:,.1f}, way to FFN {stages.to_ffn_s * 1e6:,.1f}, "
        f"FFN {stages.ffn_s * 1e6:,.1f}, way back {stages.to_attention_s * 1e6:,.1f}",
    ]
    values: dict[str, object] = {
        "batch": num_sequences,
        "context_tokens": case.context_tokens,
        "stage_us": {
            "attention": stages.attention_s * 1e6,
            "to_ffn": stages.to_ffn_s * 1e6,
            "ffn": stages.ffn_s * 1e6,
            "to_attention": stages.to_attention_s * 1e6,
        },
    }
    if not arguments.lockstep:
        constant_s = step_s(stages, case.shape.num_layers, count, case.head_s)
        values["tpot_ms_without_jitter"] = constant_s * 1e3
        lines.append(f"closed form without jitter: {constant_s * 1e3:,.2f} ms a token")
    cache_tokens = count_cache_tokens(case)
    needed = num_sequences * case.context_tokens
    values |= {"kv_cache_tokens": cache_tokens, "fits": None if cache_tokens is None else needed <= cache_tokens}
    if values["fits"] is False:
        lines.append(
            f"DOES NOT FIT: {needed:,} tokens of KV cache, but {cache_tokens:,} fit by the "
            "arithmetic of step3 plan memory"
        )
    summary = summarise_batch(found, num_sequences=num_sequences, num_devices=case.topology.num_devices)
    return summary, values, lines, found.events


def _run_lockstep(arguments: argparse.Namespace, case: Case, work: Work, steps: int, is_recorded: bool) -> Run:
    topology = case.topology
    if topology.num_attention != 1 or topology.num_ffn != 1:
        raise ValueError(
            f"--lockstep is simulated for 1A1F, but this is {topology.num_attention}A{topology.num_ffn}F: leave it out"
        )
    return simulate_lockstep(
        Schedule(case.shape.num_layers, case.deployment.num_microbatches),
        _first_stages(case, work),
        steps,
        draws=case.draws,
        head_s=case.head_s,
        is_exchange_on_core=arguments.exchange_on_core,
        is_recorded=is_recorded,
    )


def _run_requests(arguments: argparse.Namespace, case: Case, is_recorded: bool) -> Outcome:
    if arguments.lockstep:
        raise ValueError("--lockstep is simulated for a batch that stays full: leave it out, or the requests")
    arrivals = read_arrivals(arguments, case.shape)
    scheduler, limits = read_scheduler(arguments, case)
    service = Service(
        case.pipeline,
        Batcher(case.topology, case.timer, case.head_s),
        scheduler,
        limits=limits,
        draws=case.draws,
        is_recorded=is_recorded,
    )
    found = service.serve(arrivals)
    loop = "come at their times" if arrivals.concurrency is None else f"{arrivals.concurrency} under way at a time"
    where = "prefilled elsewhere" if arguments.decode_only else "prefilled here, at the shares of decoding"
    prompt, output = (
        sum(lengths) / len(arrivals.requests)
        for lengths in (
            [one.prompt_tokens for one in arrivals.requests],
            [one.output_tokens for one in arrivals.requests],
        )
    )
    lines = [
        f"{len(arrivals.requests):,} requests, {loop}; on average {prompt:,.0f} tokens of prompt ({where}) and "
        f"{output:,.0f} of output",
        f"each of {case.topology.num_attention_devices} attention devices: KV cache of {scheduler.shard_tokens:,} tokens, "
        f"{scheduler.max_num_seqs} slots"
        + ("" if arguments.decode_only else f", {scheduler.max_num_batched_tokens} prompt tokens at once"),
    ]
    values: dict[str, object] = {
        "mean_prompt_tokens": prompt,
        "mean_output_tokens": output,
        "kv_cache_tokens": scheduler.shard_tokens * case.topology.num_attention_devices,
    }
    return summarise_service(found, num_devices=case.topology.num_devices), values, lines, found.events


def _first_stages(case: Case, work: Work) -> StageTimes:
    """Times of the first micro-batch, which has the extra sequences when a batch does not divide evenly."""
    pace_s = case.pipeline.way_s
    return StageTimes(
        max(work.attention_s[0]),
        work.to_ffn[0] * pace_s,
        max(work.ffn_s[0]),
        work.to_attention[0] * pace_s,
        case.pipeline.latency_s,
    )
