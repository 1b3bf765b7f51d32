"""The options of `step3 plan simulate`: the deployment, and the times of its stages."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re

from step3_jax.layout.deployment import Deployment, Topology, check_microbatches, load_deployment, parse_deployment
from step3_jax.layout.hardware import Hardware, load_hardware
from step3_jax.layout.payload import PayloadSize, choose_payload
from step3_jax.planner.quantity import parse_tokens
from step3_jax.planner.shape import ModelShape, load_shape
from step3_jax.planner.simulation.closed_form import StageTimes, stage_budget_s
from step3_jax.planner.simulation.jitter import Draws, Jitter
from step3_jax.planner.simulation.lane import Pipeline
from step3_jax.planner.simulation.measured import MeasuredStages, read_stages
from step3_jax.planner.simulation.stage_time import FixedTimer, RooflineTimer
from step3_jax.timeline.event import Lane

# Devices of an instance in the paper's deployments.
DEFAULT_INSTANCE_DEVICES = 8
_SPEC = re.compile(r"\d+a\d+f", re.IGNORECASE)
_STAGES = ("attention_us", "to_ffn_us", "ffn_us", "to_attention_us")


@dataclasses.dataclass(frozen=True)
class Case:
    """What is simulated.

    Attributes:
      deployment: With the command line's values in place of its own.
      topology: Its instances.
      shape: The model.
      pipeline: Lanes and links.
      timer: Times of the stages.
      draws: Their random variation.
      head_s: Time of the head, between two steps.
      context_tokens: Mean context of the sequences; None if unknown.
      notes: What the times are based on, for people.
    """

    deployment: Deployment
    topology: Topology
    shape: ModelShape
    pipeline: Pipeline
    timer: RooflineTimer | FixedTimer
    draws: Draws
    head_s: float
    context_tokens: int | None
    notes: tuple[str, ...]

    @property
    def stage_times(self) -> StageTimes | None:
        """The times if they were given; None if they follow from the batch."""
        timer = self.timer
        if not isinstance(timer, FixedTimer):
            return None
        return StageTimes(timer.attention, timer.to_ffn, timer.ffn, timer.to_attention, self.pipeline.latency_s)


def read_case(arguments: argparse.Namespace) -> Case:
    """Reads what to simulate.

    Raises:
      ValueError: For a usage error; the message says what is allowed.
    """
    if arguments.seed < 0:
        raise ValueError(f"--seed {arguments.seed}: a whole number of at least 0 is needed")
    deployment, topology = _read_deployment(arguments)
    shape = load_shape(arguments.model)
    context_tokens = _read_context(arguments, deployment, shape)
    jitter: dict[Lane, Jitter] = {}
    head_s = (arguments.head_us or 0.0) / 1e6
    bandwidths: tuple[float, float] | None = None
    count = deployment.num_microbatches
    if (given := _read_given(arguments, shape.num_layers, count)) is not None:
        timer: RooflineTimer | FixedTimer = given
        notes = given.sources
    elif arguments.stage_times is not None:
        measured = read_stages(arguments.stage_times)
        timer, jitter = _of_measured(measured), measured.jitter()
        head_s = head_s if arguments.head_us is not None else measured.head_s
        notes = timer.sources
    else:
        timer, bandwidths, notes = _read_roofline(arguments, deployment, topology, shape, context_tokens)
    if arguments.jitter is not None:
        jitter |= {"attention": Jitter(arguments.jitter), "ffn": Jitter(arguments.jitter)}
    if arguments.network_jitter is not None:
        jitter |= {"to_ffn": Jitter(arguments.network_jitter), "to_attention": Jitter(arguments.network_jitter)}
    pipeline = Pipeline(
        shape.num_layers,
        count,
        topology.num_attention,
        topology.num_ffn,
        arguments.latency_us / 1e6,
        *(bandwidths or (None, None)),
    )
    draws = Draws(jitter, arguments.seed)
    return Case(deployment, topology, shape, pipeline, timer, draws, head_s, context_tokens, notes)


def read_count(arguments: argparse.Namespace, name: str) -> int | None:
    """A number of tokens from the command line; None without it."""
    value = getattr(arguments, name)
    return None if value is None else parse_tokens(value, f"--{name.replace('_', '-')}")


def _read_deployment(arguments: argparse.Namespace) -> tuple[Deployment, Topology]:
    name, devices = arguments.deployment, arguments.devices_per_instance
    try:
        deployment = load_deployment(name)
    except ValueError:
        if not _SPEC.fullmatch(name):
            raise
        each = DEFAULT_INSTANCE_DEVICES if devices is None else devices
        deployment = parse_deployment(
            name, {"afd": name, "devices_per_instance": each, "weights": "fp8", "kv_cache": "fp8", "payload": "fp8"}
        )
    else:
        if devices is not None:
            raise ValueError(
                f"--devices-per-instance: {name} is a deployment file, which already says how many there are"
            )
    topology = deployment.topology
    if topology is None:
        raise ValueError(
            f"{name} has attention and FFN on the same devices: only a deployment with separate devices is simulated"
        )
    if arguments.microbatches is not None:
        check_microbatches(arguments.microbatches)
        deployment = dataclasses.replace(deployment, num_microbatches=arguments.microbatches)
    return deployment, topology


def _read_context(arguments: argparse.Namespace, deployment: Deployment, shape: ModelShape) -> int | None:
    if arguments.context is None:
        return None if deployment.workload is None else deployment.workload.context_tokens
    context_tokens = parse_tokens(arguments.context)
    limit = shape.max_context_tokens or math.inf
    if context_tokens > limit:
        raise ValueError(f"--context {context_tokens}: {shape.printed_name} has positions for {limit:,} tokens")
    return context_tokens


def _read_given(arguments: argparse.Namespace, num_layers: int, num_microbatches: int) -> FixedTimer | None:
    """Times from the command line; None if there are none."""
    given = {name: getattr(arguments, name) for name in _STAGES if getattr(arguments, name) is not None}
    ways = [
        name
        for name, is_used in (
            ("--attention-us and the like", bool(given)),
            ("--tpot-ms", arguments.tpot_ms is not None),
            ("--stage-times", arguments.stage_times is not None),
            ("--times", arguments.times is not None),
        )
        if is_used
    ]
    if len(ways) > 1:
        raise ValueError(f"{ways[0]} and {ways[1]} both say how long the stages take: give one of them")
    if arguments.tpot_ms is not None:
        if not (math.isfinite(arguments.tpot_ms) and arguments.tpot_ms > 0):
            raise ValueError(f"--tpot-ms {arguments.tpot_ms:g}: a number above 0 is needed")
        own_s = stage_budget_s(arguments.tpot_ms / 1e3, num_layers, num_microbatches)
        source = f"stages of {own_s * 1e6:.1f} us, for {arguments.tpot_ms:g} ms per token: arithmetic, not a prediction"
        # With one micro-batch in flight the sides alternate.
        return FixedTimer(own_s, 0.0, own_s if num_microbatches > 1 else 0.0, 0.0, (source,))
    if not given:
        return None
    for name in ("attention_us", "ffn_us"):
        if name not in given:
            raise ValueError(
                f"--{name.replace('_', '-')} is missing: both sides' times are needed; the transfers take 0 if left out"
            )
    for name, value in given.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"--{name.replace('_', '-')} {value:g}: a number of at least 0 is needed")
    attention_s, to_ffn_s, ffn_s, to_attention_s = (given.get(name, 0.0) / 1e6 for name in _STAGES)
    return FixedTimer(attention_s, to_ffn_s, ffn_s, to_attention_s, ("as given on the command line",))


def _of_measured(measured: MeasuredStages) -> FixedTimer:
    return FixedTimer(
        measured.mean_s("attention"),
        measured.mean_s("to_ffn"),
        measured.mean_s("ffn"),
        measured.mean_s("to_attention"),
        (f"measured: {measured.source}",),
    )


def _read_roofline(
    arguments: argparse.Namespace,
    deployment: Deployment,
    topology: Topology,
    shape: ModelShape,
    context_tokens: int | None,
) -> tuple[RooflineTimer, tuple[float, float], tuple[str, ...]]:
    attention = _load_side(
        arguments.attention_hardware or arguments.hardware or deployment.hardware, "--attention-hardware"
    )
    # A file that names one device has it on both sides.
    ffn_name = arguments.ffn_hardware or arguments.hardware or deployment.ffn_hardware or deployment.hardware
    ffn = _load_side(ffn_name, "--ffn-hardware")
    payload = choose_payload(arguments.payload or deployment.payload, "bfloat16")
    timer = RooflineTimer(
        shape,
        arguments.kv_dtype or deployment.kv_cache,
        attention,
        ffn,
        topology.num_ffn_devices,
        PayloadSize(payload, shape.hidden_size, shape.ffn.top_k),
    )
    if (arguments.times or "expected") == "expected":
        typical = context_tokens or read_count(arguments, "prompt_tokens")
        if typical is None:
            raise ValueError(
                "what attention is expected to reach depends on the context: give --context, or --times ideal"
            )
        timer = timer.expected(typical)
    rates = tuple(_find_network(arguments, one) for one in (attention, ffn))
    notes = (
        f"attention on {attention.name}, FFN on {ffn.name}; network {rates[0]:g} and {rates[1]:g} GB/s a device and way "
        f"({_describe_network(arguments, attention)}), latency {arguments.latency_us:g} us",
        *timer.sources,
    )
    each = topology.devices_per_instance * 1e9
    return timer, (rates[0] * each, rates[1] * each), notes


def _load_side(name: str | None, option: str) -> Hardware:
    if name is None:
        raise ValueError(
            f"nothing says which devices there are: give --hardware or {option}, or the times of the stages"
        )
    return load_hardware(name)


def _find_network(arguments: argparse.Namespace, hardware: Hardware) -> float:
    rate = hardware.network_gb_s if arguments.network_gb_s is None else arguments.network_gb_s
    if rate is None:
        raise ValueError(
            f"{hardware.name} has no network in its file: give --network-gb-s, of one device in each direction"
        )
    if not (math.isfinite(rate) and rate > 0):
        raise ValueError(f"--network-gb-s {rate:g}: a number above 0 is needed")
    return float(rate)


def _describe_network(arguments: argparse.Namespace, hardware: Hardware) -> str:
    return (
        "as given"
        if arguments.network_gb_s is not None
        else hardware.sources.get("network_gb_s", "the hardware's file")
    )
