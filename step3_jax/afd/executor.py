"""Builds the executor for a choice of devices."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable

from step3_jax.afd.host.executor import HostExecutor, load_host_executor
from step3_jax.afd.placement import place_model
from step3_jax.afd.program.attention_process import AttentionProcess
from step3_jax.afd.program.executor import load_program_executor, make_program_executor
from step3_jax.afd.program.ffn_process import FfnProcess
from step3_jax.afd.topology import AfdTopology
from step3_jax.engine.config import EngineConfig
from step3_jax.model.step3 import Step3


@dataclasses.dataclass(frozen=True)
class AfdChoice:
    """The AFD options that were given.

    Attributes:
      topology: The devices.
      num_microbatches: Micro-batches in flight.
      payload: What crosses from attention to FFN.
      deadline_s: The longest a stage may take, for executor host.
      executor: "host" or "program".
    """

    topology: AfdTopology
    num_microbatches: int
    payload: str
    deadline_s: float
    executor: str


def load_afd_executor(
    choice: AfdChoice, folder: pathlib.Path, config: EngineConfig
) -> HostExecutor | AttentionProcess | FfnProcess:
    """Loads a model onto the chosen devices.

    Args:
      choice: From `read_afd_choice`.
      folder: The model's folder.
      config: Gives the dtypes of weights and activations.

    Raises:
      ValueError: If the model cannot be sharded over the devices, or it cannot be loaded.
    """
    is_host = choice.executor == "host"
    load: Callable[..., HostExecutor | AttentionProcess | FfnProcess] = (
        functools.partial(load_host_executor, deadline_s=choice.deadline_s) if is_host else load_program_executor
    )
    return load(
        folder,
        choice.topology,
        dtype=None if config.dtype == "auto" else config.dtype,
        quantization=config.quantization,
        load_format=config.load_format,
        num_microbatches=choice.num_microbatches,
        payload=choice.payload,
    )


def place_executor(choice: AfdChoice, model: Step3) -> HostExecutor | AttentionProcess | FfnProcess:
    """The same for a model in memory, to measure or trace it.

    Raises:
      ValueError: If the model cannot be sharded over the devices.
    """
    placed, topology, num_microbatches = place_model(model, choice.topology), choice.topology, choice.num_microbatches
    if choice.executor == "program":
        return make_program_executor(placed, topology, num_microbatches=num_microbatches, payload=choice.payload)
    return HostExecutor(
        placed, topology, num_microbatches=num_microbatches, payload=choice.payload, deadline_s=choice.deadline_s
    )
