"""The engine that a command's options ask for: on one device, on several, or with attention and FFN apart."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib

from step3_jax.cli.afd_option import AfdChoice, load_afd_executor, read_afd_choice
from step3_jax.cli.parallel import read_parallel
from step3_jax.engine.llm import LLM
from step3_jax.mesh import find_devices
from step3_jax.sharding import Parallel


@dataclasses.dataclass(frozen=True)
class DeviceChoice:
    """Where the model is to run; one device if neither is given.

    Attributes:
      parallel: Sharded over several devices.
      afd: With attention and FFN on devices of their own.
    """

    parallel: Parallel | None
    afd: AfdChoice | None


def read_devices(arguments: argparse.Namespace) -> DeviceChoice:
    """Reads the options of `add_devices`: to be called before the first use of a device.

    Raises:
      ValueError: For options that do not go together or that the devices do not fit, or if JAX_PLATFORMS asks for what
        is not there.
    """
    # With it --tp and --ep are the FFN side's.
    afd = read_afd_choice(arguments)
    choice = DeviceChoice(read_parallel(arguments) if afd is None else None, afd)
    find_devices()
    return choice


def load_llm(arguments: argparse.Namespace, folder: pathlib.Path, devices: DeviceChoice) -> LLM:
    """The model in `folder`, loaded as `option.add_model`'s options say.

    Raises:
      ValueError: For everything that the checkpoint or the engine refuses.
    """
    return LLM(
        folder,
        dtype=arguments.dtype,
        max_model_len=arguments.max_model_len,
        kv_cache_dtype=arguments.kv_cache_dtype,
        max_num_batched_tokens=arguments.max_num_batched_tokens,
        parallel=devices.parallel,
        executor=load_afd_executor(devices.afd, folder, arguments.dtype),
    )
