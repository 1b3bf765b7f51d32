"""Options of attention-FFN disaggregation."""

from __future__ import annotations

import argparse
import dataclasses

import jax

from step3_jax.afd.executor import AfdChoice
from step3_jax.afd.topology import AfdTopology
from step3_jax.engine.config import EngineConfig
from step3_jax.layout.deployment import DEFAULT_DEADLINE_S, Deployment, Topology, check_microbatches, read_afd
from step3_jax.mesh import force_cpu_devices

# Options that mean nothing without --afd, with the value that means "not given".
_NEEDS_AFD: dict[str, object] = {
    "afd_devices": None,
    "afd_ffn_device": None,
    "afd_microbatches": None,
    "afd_payload": None,
    "afd_executor": "auto",
    "afd_deadline": DEFAULT_DEADLINE_S,
}


def read_afd_choice(
    arguments: argparse.Namespace, config: EngineConfig | None = None, deployment: Deployment | None = None
) -> AfdChoice | None:
    """Reads the options, and makes a CPU look like as many devices as needed: call it before the first use of a device.

    Args:
      arguments: The options of `add_afd`.
      config: The settings, whose tensor and expert parallel sizes are for the FFN side; None for the defaults.
      deployment: A configuration file's, used if `--afd` is not given.

    Returns:
      The choice; None without `--afd`.

    Raises:
      ValueError: For options that need `--afd` or exclude it, a topology that cannot be read,
        or one that does not fit the devices.
    """
    if arguments.afd is not None:
        deployment = read_afd(arguments.afd, arguments.afd_devices)
    if deployment is None or deployment.topology is None:
        for name, default in _NEEDS_AFD.items():
            if getattr(arguments, name) != default:
                raise ValueError(
                    f"--{name.replace('_', '-')} is for attention and FFN on separate devices: add --afd xAyF"
                )
        return None
    config = config or EngineConfig()
    if config.data_parallel_size != 1 or config.attention_parallelism != "data":
        raise ValueError(
            "--data-parallel-size and --attention-parallelism cannot be combined with --afd: attention is data parallel "
            "over the devices of its instances; --tensor-parallel-size and --expert-parallel-size shard the FFN side"
        )
    instances, parallel = deployment.topology, deployment.parallel
    tp, ep = config.tensor_parallel_size, config.expert_parallel_size
    if tp != 1 or ep is not None:
        tp = parallel.tp if tp == 1 else tp
        ep = parallel.ep if ep is None else ep
        parallel = dataclasses.replace(parallel, dp=max(instances.num_ffn_devices // tp, 1), tp=tp, ep=ep)
    # A configuration file's value is in the settings; that of a file given with --afd is not.
    is_copied = config.mm_encoder_tp_mode == "data" or (arguments.afd is not None and parallel.vision == "data")
    parallel = dataclasses.replace(parallel, vision="data" if is_copied else "weights")
    given = arguments.afd_microbatches
    num_microbatches = deployment.num_microbatches if given is None else given
    check_microbatches(num_microbatches)
    force_cpu_devices(instances.num_devices)
    ffn_device = arguments.afd_ffn_device or deployment.ffn_device
    return AfdChoice(
        AfdTopology.of(instances, parallel, ffn_device=ffn_device),
        num_microbatches,
        arguments.afd_payload or deployment.payload,
        arguments.afd_deadline,
        _choose_executor(arguments.afd_executor, instances, ffn_device),
    )


def _choose_executor(asked: str, instances: Topology, ffn_device: str) -> str:
    """The executor that the number of processes calls for.

    Raises:
      ValueError: If another one was requested, or the FFN side is on the CPUs of several processes.
    """
    count = jax.process_count()
    if count > 1 and ffn_device == "cpu":
        raise ValueError(
            f"--afd-ffn-device cpu is for one process, whose memory holds the experts, but there are {count}: leave out "
            "step3 launch"
        )
    fitting = "host" if count == 1 else "program"
    if asked in ("auto", fitting):
        return fitting
    if asked == "program":
        raise ValueError(
            f"--afd-executor program runs {instances.spec} in a process for each device, but this is one process: start "
            f"it with step3 launch --local {instances.num_devices} -- ..., or leave the option out"
        )
    raise ValueError(
        f"--afd-executor host runs {instances.spec} in one process, but there are {count}: leave the option out, or start "
        "it without step3 launch"
    )
