"""The shares of the ideal that a deployment is expected to reach: published ones, in terms of the stages' arithmetic."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from step3_jax.config import ModelConfig
from step3_jax.layout.deployment import parse_deployment
from step3_jax.layout.hardware import load_hardware
from step3_jax.layout.role import deployed_config
from step3_jax.planner.context import parse_contexts
from step3_jax.planner.efficiency import base_run, fit_shares
from step3_jax.planner.estimate import choose_attention_share, choose_ffn_share
from step3_jax.planner.expert_load import even_load
from step3_jax.planner.own_measurement import OwnMeasurement
from step3_jax.planner.pipeline import Machines, count_decode
from step3_jax.planner.published import AFD, EP
from step3_jax.planner.shape import ModelShape
from step3_jax.planner.stage import Arithmetic, Model, Shares, stage_seconds

NETWORK_SHARE = 0.8
_NETWORK_SOURCE = "arXiv 2507.19427, section 5.4: 40 GB/s of an interface of 400 Gbit/s (links assumed alike)"


@dataclasses.dataclass(frozen=True)
class Expectation:
    """The expected efficiency of a deployment.

    Attributes:
      shares: Shares of the ideal.
      sources: Their sources, one line each.
      is_measured: Whether exactly this design, these devices and this arrangement were measured.
    """

    shares: Shares
    sources: tuple[str, ...]
    is_measured: bool


def expect(
    machines: Machines,
    shape: ModelShape,
    context_tokens: float,
    kv_cache: str,
    measurements: Sequence[OwnMeasurement] = (),
) -> Expectation:
    """The expected efficiency of devices.

    Args:
      machines: The devices.
      shape: The model.
      context_tokens: Mean context.
      kv_cache: Format of the pages.
      measurements: The user's own, which replace published shares on their hardware.
    """
    arrangement = AFD if machines.is_apart else EP
    kv_dtype = kv_cache if kv_cache in ("fp8", "int4") else "bfloat16"
    attention = choose_attention_share(shape, context_tokens, kv_dtype, machines.attention, arrangement, measurements)
    ffn = choose_ffn_share(kv_dtype, machines.ffn, arrangement, measurements)
    own, other = _convert(kv_dtype) if machines.is_apart else (1.0, 1.0)
    # Shares of processors are of layers, which have no such losses in them.
    other = 1.0 if machines.ffn.is_host else other
    shares = Shares(min(attention.value * own, 1.0), min(ffn.value * other, 1.0), NETWORK_SHARE)
    sources = tuple(dict.fromkeys((attention.source, ffn.source, _NETWORK_SOURCE)))
    return Expectation(shares, sources, attention.is_measured and ffn.is_measured)


@functools.cache
def _convert(kv_dtype: str) -> tuple[float, float]:
    """Factors from the shares of `efficiency.py` to those of the stages here, which include more.

    The head, norms, scales, and one device with more than the mean count as work here and as losses there. With these
    factors the run that the shares come from takes its measured time.
    """
    run = base_run(AFD, kv_dtype)
    hardware, config = load_hardware(run.hardware), deployed_config(ModelConfig.preset(run.model), "fp8")
    size = hardware.devices_per_machine
    spec = f"{run.attention_devices // size}a{run.ffn_devices // size}f"
    deployment = parse_deployment(run.name, {"afd": spec, "devices_per_instance": size})
    machines = Machines.of(deployment, hardware, hardware)
    model = Model(config, "fp8", kv_dtype, parse_contexts(str(run.context_tokens)), even_load(config.text))
    stages = count_decode(Arithmetic(model, by_chance=True), machines, np.array([run.sequences_per_device]), Shares())
    step_s = run.sequences / (run.tokens_per_s_per_device * run.num_devices)
    own, other = (
        float(stage_seconds(stage)[0]) * run.micro_batches / step_s for stage in (stages.attention, stages.ffn)
    )
    fitted = fit_shares(run)
    return own / fitted.attention, other / fitted.ffn
