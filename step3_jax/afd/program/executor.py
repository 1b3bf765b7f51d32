"""Executor `program`: a process for each device (or several devices of one role); each call is one program per role.

A process compiles only its own role's programs, under `jax.shard_map` over the devices of all processes. The two
roles' programs differ, and have the same exchanges in the same order (`schedule`, `wire`): that is all that connects
them, and no host takes part in a decode step. Rank 0, on the attention side, is driven by an engine and drives the
others (`engine/drive`): an attention process is an executor, an FFN process is a worker that is told only the sizes of
calls.
"""

from __future__ import annotations

import os
from typing import Literal

import jax

from step3_jax.afd.placement import load_placed_model
from step3_jax.afd.program.attention_process import AttentionProcess
from step3_jax.afd.program.ffn_process import FfnProcess
from step3_jax.afd.topology import AfdTopology
from step3_jax.layout.deployment import DEFAULT_MICROBATCHES, check_microbatches
from step3_jax.model.step3 import Step3

Role = Literal["attention", "ffn"]


def make_program_executor(
    model: Step3, topology: AfdTopology, *, num_microbatches: int = DEFAULT_MICROBATCHES, payload: str = "auto"
) -> AttentionProcess | FfnProcess:
    """The executor of this process, for a model whose weights are placed as `topology.parameter` says.

    `load_program_executor` and `placement.place_model` do that. On a CPU a bfloat16 model is held and run in float32,
    as `Runner` does.

    Args:
      model: The model; only the weights of this process's role are used.
      topology: The devices of all processes.
      num_microbatches: Micro-batches in flight, 1 to 4.
      payload: What crosses from attention to FFN: "fp8", "bfloat16", "float32", or "auto", which is float32 for float32
        activations and fp8 for others.

    Raises:
      ValueError: If a value is not allowed, the FFN side cannot hold the model in shards, or the processes do not fit
        the topology.
    """
    check_microbatches(num_microbatches)
    role = AttentionProcess if find_role(topology) == "attention" else FfnProcess
    return role(model, topology, num_microbatches=num_microbatches, payload=payload)


def load_program_executor(
    path: str | os.PathLike[str],
    topology: AfdTopology,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    quantization: str = "auto",
    load_format: str = "auto",
    num_microbatches: int = DEFAULT_MICROBATCHES,
    payload: str = "auto",
) -> AttentionProcess | FfnProcess:
    """Loads what this process needs of a model's folder; every process calls it.

    Args:
      path: Folder with `config.json` and the weights.
      topology: The devices of all processes.
      dtype: "float32" or "bfloat16"; if absent the configuration's. On a CPU it is float32.
      quantization: As for `load_placed_model`, and so is the next.
      load_format: See there.
      num_microbatches: As for `make_program_executor`.
      payload: See there.

    Raises:
      ValueError: As `load_placed_model` and `make_program_executor` do; processes that do not fit are refused before
        anything is loaded.
    """
    check_microbatches(num_microbatches)
    find_role(topology)
    model = load_placed_model(
        path, topology, dtype=dtype, quantization=quantization, load_format=load_format, payload=payload
    )
    return make_program_executor(model, topology, num_microbatches=num_microbatches, payload=payload)


def find_role(topology: AfdTopology) -> Role:
    """The role of this process.

    Raises:
      ValueError: If its devices have no role or both, or a process has none of the topology's devices.
    """
    spec, own = topology.instances.spec, set(topology.union.local_devices)
    num_processes = len({device.process_index for device in topology.devices})
    if num_processes < jax.process_count() or len(own) < jax.local_device_count():
        raise ValueError(
            f"--afd {spec} needs {topology.union.size} devices, and the {jax.process_count()} process(es) have "
            f"{jax.device_count()}: every process must be part of it"
        )
    is_attention = own <= set(topology.devices[: topology.num_attention])
    if num_processes == 1 or not (is_attention or own <= set(topology.devices[topology.num_attention :])):
        raise ValueError(
            f"executor program needs processes of one role each, but this one has devices of both roles of {spec}: "
            f"start it with step3 launch --local {topology.union.size}, or use executor host"
        )
    return "attention" if is_attention else "ffn"
