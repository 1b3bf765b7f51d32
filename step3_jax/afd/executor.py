"""The executor that a choice of devices asks for."""

from __future__ import annotations

import dataclasses
import pathlib

from step3_jax.afd.host.executor import HostExecutor, load_host_executor
from step3_jax.afd.placement import place_model
from step3_jax.afd.program.attention_process import AttentionProcess
from step3_jax.afd.program.executor import load_program_executor
from step3_jax.afd.program.ffn_process import FfnProcess
from step3_jax.afd.topology import AfdTopology
from step3_jax.model.step3 import Step3


@dataclasses.dataclass(frozen=True)
class AfdChoice:
    """What was asked for.

    Attributes:
      topology: The devices.
      num_microbatches: In flight.
      payload: What crosses from attention to FFN.
      deadline_s: Longest time of a stage, for executor host.
      executor: "host" or "program".
    """

    topology: AfdTopology
    num_microbatches: int
    payload: str
    deadline_s: float
    executor: str


def load_afd_executor(
    choice: AfdChoice | None, folder: pathlib.Path, dtype: str
) -> HostExecutor | AttentionProcess | FfnProcess | None:
    """Loads a model on the devices that were chosen.

    Args:
      choice: From `read_afd_choice`.
      folder: The model's.
      dtype: "auto", or the dtype of weights and activations.

    Returns:
      The executor; None without a choice.

    Raises:
      ValueError: If the devices cannot share out the model, or it cannot be loaded.
    """
    if choice is None:
        return None
    own_dtype = None if dtype == "auto" else dtype
    topology, num_microbatches, payload = choice.topology, choice.num_microbatches, choice.payload
    if choice.executor == "program":
        return load_program_executor(
            folder, topology, dtype=own_dtype, num_microbatches=num_microbatches, payload=payload
        )
    return load_host_executor(
        folder,
        topology,
        dtype=own_dtype,
        num_microbatches=num_microbatches,
        payload=payload,
        deadline_s=choice.deadline_s,
    )


def place_executor(choice: AfdChoice, model: Step3) -> HostExecutor:
    """The same for a model in memory and one process, whose speed or trace is wanted.

    Raises:
      ValueError: If the devices cannot share out the model, or there are several processes.
    """
    if choice.executor != "host":
        raise ValueError("this is for executor host, whose one process sees both sides: start it without step3 launch")
    return HostExecutor(
        place_model(model, choice.topology),
        choice.topology,
        num_microbatches=choice.num_microbatches,
        payload=choice.payload,
        deadline_s=choice.deadline_s,
    )
