"""Requests through a simulated deployment, and what is reported of them."""

from __future__ import annotations

import pytest

from step3_jax.config import ModelConfig
from step3_jax.layout.admission import STEPS_PER_CALL
from step3_jax.layout.deployment import Topology, parse_topology
from step3_jax.layout.hardware import load_hardware
from step3_jax.layout.payload import PayloadSize
from step3_jax.planner.cost import attention_roofline_seconds, count_token_work, ffn_roofline_seconds
from step3_jax.planner.published import load_runs
from step3_jax.planner.shape import ModelShape
from step3_jax.planner.simulation.arrival import Arrivals, arrive_at_rate, repeat_lengths
from step3_jax.planner.simulation.batch import Batcher, Rows, spread_evenly
from step3_jax.planner.simulation.closed_form import stage_budget_s
from step3_jax.planner.simulation.jitter import Draws, Jitter
from step3_jax.planner.simulation.lane import Pipeline
from step3_jax.planner.simulation.scheduler import Scheduler
from step3_jax.planner.simulation.service import CallLimits, Service, ServiceRun
from step3_jax.planner.simulation.simulate import simulate
from step3_jax.planner.simulation.stage_time import FixedTimer, RooflineTimer
from step3_jax.planner.simulation.summary import Summary, summarise_batch, summarise_service, to_dict, to_lines
from step3_jax.planner.trace_file import TraceRequest

STEP3 = ModelShape.of_config(ModelConfig.preset("step3"))
PAYLOAD = PayloadSize("fp8", 7168, 3)


def roofline(topology: Topology, kv_dtype: str = "fp8") -> RooflineTimer:
    h800 = load_hardware("h800")
    return RooflineTimer(STEP3, kv_dtype, h800, h800, topology.num_ffn_devices, PAYLOAD)


def simulate_batch(topology: Topology, timer: RooflineTimer | FixedTimer, sequences: int, context: int) -> Summary:
    """Eight steps with three micro-batches and 50 GB/s per device."""
    is_fixed = isinstance(timer, FixedTimer)
    bandwidth = None if is_fixed else 50e9 * topology.devices_per_instance
    pipeline = Pipeline(
        61,
        3,
        topology.num_attention,
        topology.num_ffn,
        attention_bytes_s=bandwidth,
        ffn_bytes_s=bandwidth,
    )
    work = Batcher(topology, timer).decode(spread_evenly(topology, 3, sequences, context), is_growing=False)
    run = simulate(pipeline, work, 8)
    return summarise_batch(run, num_sequences=sequences, num_devices=topology.num_devices)


@pytest.mark.parametrize(
    ("spec", "sequences", "context", "tpot_ms", "tgs"),
    [
        ("2a2f", 6144, 4096, 47.5, 4039),
        ("2a2f", 6144, 4096, 49.1, 3910),
        ("3a2f", 6048, 4096, 45.5, 3321),
        ("4a2f", 6144, 8192, 48.4, 2643),
        ("3a4f", 9216, 4096, 50.0, 3291),
        ("4a4f", 9216, 4096, 50.0, 2880),
    ],
)
def test_batch_and_time_per_token_of_the_report_give_its_throughput(
    spec: str, sequences: int, context: int, tpot_ms: float, tgs: float
) -> None:
    """Table 8 and section 7.3 of arXiv 2507.19427: arithmetic alone, its times per token being batch over throughput."""
    topology = parse_topology(spec, 8)
    stage_s = stage_budget_s(tpot_ms / 1e3, 61)
    found = simulate_batch(topology, FixedTimer(stage_s, 0.0, stage_s, 0.0), sequences, context)
    assert found.tokens_per_s_per_device == pytest.approx(tgs, rel=0.03)
    assert found.tpot is not None
    assert found.tpot.mean * 1e3 == pytest.approx(tpot_ms, rel=1e-9)
    # One stage of three belongs to neither side: transfers take no time here.
    assert found.use.attention == pytest.approx(1.0, abs=0.02)


def test_shares_of_a_published_run_give_its_throughput_back() -> None:
    """The run that the shares were fitted on; its network is overlapped in the pipeline and hidden."""
    published = load_runs()["step3-2a2f"]
    topology = parse_topology("2a2f", 8)
    found = simulate_batch(topology, roofline(topology).expected(4096), published.sequences, published.context_tokens)
    assert found.tokens_per_s_per_device == pytest.approx(published.tokens_per_s_per_device, rel=0.01)
    assert 0 < found.use.to_ffn < found.use.to_attention < 0.5


def test_stage_times_are_those_of_the_planners_roofline() -> None:
    topology = parse_topology("2a2f", 8)
    timer = roofline(topology)
    work = Batcher(topology, timer).decode(spread_evenly(topology, 3, 6144, 4096))
    h800 = load_hardware("h800")
    attention = 128 * attention_roofline_seconds(STEP3, count_token_work(STEP3, 4096, rule="exact"), h800, 128) / 61
    ffn = 2048 * ffn_roofline_seconds(STEP3, h800, 2048) / 16 / 61
    assert work.attention_s == ((pytest.approx(attention),) * 2,) * 3
    assert work.ffn_s == ((pytest.approx(ffn),) * 2,) * 3
    # 8 devices of 128 rows each, as sent to either FFN instance.
    assert work.to_ffn == (1024 * 7410,) * 3
    assert work.to_attention == (1024 * 14336,) * 3
    assert all(value > 0 for row in work.growth_s for value in row)


def test_the_device_with_most_cached_tokens_sets_its_instances_pace() -> None:
    topology = parse_topology("1a1f", 2)
    batcher = Batcher(topology, roofline(topology))
    even = batcher.decode([[Rows(4, 4000), Rows(4, 4000)]])
    uneven = batcher.decode([[Rows(4, 4000), Rows(4, 9000)]])
    assert uneven.attention_s[0][0] > even.attention_s[0][0]
    assert uneven.ffn_s == even.ffn_s
    with pytest.raises(ValueError, match="a batch of 2 cannot be cut into 3"):
        spread_evenly(topology, 3, 2, 10)


def serve(
    arrivals: Arrivals, *, prefills: bool = True, steps: int = STEPS_PER_CALL, call_s: float | None = None, **sizes: int
) -> ServiceRun:
    """On 1A1F of one device, by the roofline of two H800."""
    topology = parse_topology("1a1f")
    values = {"shard_pages": 4000, "max_num_seqs": 32, "max_num_batched_tokens": 2048} | sizes
    scheduler = Scheduler(num_shards=1, has_prefill=prefills, **values)  # type: ignore[arg-type]
    service = Service(
        Pipeline(61, 3, attention_bytes_s=50e9, ffn_bytes_s=50e9),
        Batcher(topology, roofline(topology)),
        scheduler,
        limits=CallLimits(steps=steps, call_s=call_s),
    )
    return service.serve(arrivals)


def test_every_request_gets_its_tokens_and_in_its_time() -> None:
    requests = [TraceRequest(1000 + 700 * index, 5 + 3 * index, 0.01 * index) for index in range(12)]
    run = serve(Arrivals(requests))
    assert sorted(one.number for one in run.requests) == list(range(12))
    for one in run.requests:
        assert one.num_generated == requests[one.number].output_tokens
        assert one.admitted_s is not None
        assert one.first_s is not None
        assert one.end_s is not None
        assert one.arrival_s <= one.admitted_s < one.first_s <= one.end_s <= run.end_s
    assert max(run.attention_busy_s, run.ffn_busy_s, run.to_ffn_busy_s, run.to_attention_busy_s) <= run.calling_s
    assert run.calling_s <= run.end_s * (1 + 1e-9)


def test_a_prompt_that_is_prefilled_here_delays_its_first_token() -> None:
    load = Arrivals([TraceRequest(30_000, 2, 0.0)])
    here, elsewhere = serve(load), serve(load, prefills=False)
    assert (here.requests[0].first_s or 0) > 5 * (elsewhere.requests[0].first_s or 0) > 0


def test_a_closed_loop_has_as_many_under_way_as_it_says() -> None:
    run = serve(Arrivals(repeat_lengths(500, 20, 30), concurrency=4))
    assert run.most_running == 4
    assert len(run.requests) == 30


def test_a_long_queue_turns_requests_away_and_little_cache_preempts() -> None:
    requests = [TraceRequest(500, 900, 0.0)] * 10
    run = serve(Arrivals(requests), max_queued=6, shard_pages=60)
    assert run.num_rejected == 4
    assert len(run.requests) == 6
    assert run.num_preemptions > 0
    assert run.num_truncated == 0
    alone = serve(Arrivals([TraceRequest(500, 900, 0.0)]), shard_pages=10)
    assert alone.num_truncated == 1
    assert alone.requests[0].num_generated == 10 * 64 - 500 + 1
    with pytest.raises(ValueError, match="request 1: a prompt of 700 tokens is longer"):
        serve(Arrivals([TraceRequest(700, 1, 0.0)]), shard_pages=10)


def test_pieces_of_a_stream_bound_the_calls() -> None:
    load = Arrivals([TraceRequest(64, 41, 0.0)] * 6)
    # One step for the first tokens, then ten calls of four, each with a pipeline that fills and drains; or 32 and 8.
    short, long = serve(load, steps=4), serve(load)
    assert short.num_steps == long.num_steps == 41
    assert short.end_s > long.end_s
    # A call of one step shows how long one takes.
    assert serve(load, call_s=1e-6).end_s > short.end_s


def test_more_load_never_gives_less_waiting() -> None:
    lengths = repeat_lengths(2000, 30, 40)
    waits = []
    for rate in (0.5, 5.0, 500.0):
        found = summarise_service(serve(arrive_at_rate(lengths, rate, 3)), num_devices=2)
        assert found.ttft is not None
        waits.append(found.ttft.mean)
    assert waits == sorted(waits)


def test_what_is_said_has_all_of_it() -> None:
    run = serve(arrive_at_rate(repeat_lengths(100, 5, 8), 50.0, 1))
    summary = summarise_service(run, num_devices=2)
    text, values = "\n".join(to_lines(summary)), to_dict(summary)
    assert "time to first token" in text
    assert "8 requests ended" in text
    assert values["requests"] == 8
    assert values["tokens_per_s_per_device"] == pytest.approx(40 / run.end_s / 2)
    topology = parse_topology("1a1f")
    batch = simulate_batch(topology, FixedTimer(1e-3, 0.0, 1e-3, 0.0), 3, 10)
    assert to_dict(batch)["ttft_ms"] is None
    pipeline = Pipeline(2, 1)
    work = Batcher(topology, FixedTimer(1.0, 0.0, 1.0, 0.0)).decode([[Rows(1, 1)]])
    with pytest.raises(ValueError, match="at least 3"):
        summarise_batch(simulate(pipeline, work, 2), num_sequences=1, num_devices=2)


def test_jitter_slows_a_batch_down() -> None:
    topology = parse_topology("2a2f", 8)
    timer = roofline(topology).expected(4096)
    work = Batcher(topology, timer).decode(spread_evenly(topology, 3, 6144, 4096), is_growing=False)
    pipeline = Pipeline(61, 3, 2, 2, 5e-6, 400e9, 400e9)
    constant = simulate(pipeline, work, 4)
    spread = simulate(pipeline, work, 4, draws=Draws({"attention": Jitter(0.1), "ffn": Jitter(0.1)}, 5))
    assert spread.end_s > 1.01 * constant.end_s
