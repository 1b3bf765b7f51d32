"""The engine for a command's options: on one device, on several, or with attention and FFN on separate devices.

The options are the fields of `EngineConfig`. The command line takes precedence over a file (`--config`).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import pathlib
from collections.abc import Mapping

import jax

from step3_jax.afd.executor import AfdChoice, load_afd_executor
from step3_jax.cli.afd_option import read_afd_choice
from step3_jax.engine.config import EngineConfig, format_config, read_config_file
from step3_jax.engine.llm import LLM
from step3_jax.engine.loading import read_parallel
from step3_jax.layout.deployment import Deployment, load_deployment, parse_deployment
from step3_jax.layout.parallel import Parallel
from step3_jax.mesh import find_devices, force_cpu_devices


@dataclasses.dataclass(frozen=True)
class EngineChoice:
    """The values of a command's options.

    Attributes:
      config: The settings.
      parallel: How the model is spread over several devices; None for one device or with `afd`.
      afd: Attention and FFN on separate devices; None if they share devices.
    """

    config: EngineConfig
    parallel: Parallel | None
    afd: AfdChoice | None


def print_config(arguments: argparse.Namespace) -> bool:
    """Prints the settings and returns True if `--print-config` was given.

    Raises:
      ValueError: As `read_engine`, before the first use of a device.
    """
    if not arguments.print_config:
        return False
    config, _, section = _read_settings(arguments)
    print(format_config(config, section), end="")
    return True


def read_engine(arguments: argparse.Namespace) -> EngineChoice:
    """Reads the options of `add_engine`: call it before the first use of a device.

    Raises:
      ValueError: For values that are not allowed, conflicting options, or ones that do not fit the devices; if
        JAX_PLATFORMS names a platform that is not there.
    """
    config, deployment, _ = _read_settings(arguments)
    # With AFD the tensor and expert parallel sizes are for the FFN side.
    afd = read_afd_choice(arguments, config, deployment)
    parallel = read_parallel(config) if afd is None else None
    if parallel is not None:
        force_cpu_devices(parallel.num_devices)
    elif afd is None and config.attention_parallelism != "data":
        raise ValueError("--attention-parallelism tensor is for several devices: add --tensor-parallel-size")
    find_devices()
    if afd is None and parallel is None and jax.process_count() > 1:
        raise ValueError(
            f"there are {jax.process_count()} processes, but the model is set to run on one device: spread it with "
            "--tensor-parallel-size, --data-parallel-size or --afd, or leave out step3 launch"
        )
    return EngineChoice(config, parallel, afd)


def read_config(arguments: argparse.Namespace) -> EngineConfig:
    """The settings from the file and the command line.

    Raises:
      ValueError: For values that are not allowed.
    """
    return _read_settings(arguments)[0]


def load_llm(choice: EngineChoice, folder: pathlib.Path) -> LLM:
    """The model in `folder`, loaded as the options say; on a rank above 0 it does not return, see `LLM`.

    Raises:
      ValueError: For everything that the checkpoint or the engine refuses.
      RunLostError: If another process of the run fails.
      SystemExit: On a rank above 0, when rank 0 has ended.
    """
    if choice.afd is None:
        return LLM(folder, config=choice.config)
    # They say how the FFN side is sharded, which the executor does.
    config = choice.config.replace(tensor_parallel_size=1, expert_parallel_size=None)
    load = functools.partial(load_afd_executor, choice.afd, folder, choice.config)
    return LLM(folder, config=config, executor=load)


def _read_settings(
    arguments: argparse.Namespace,
) -> tuple[EngineConfig, Deployment | None, str | Mapping[str, object] | None]:
    """Settings from the file and the command line, and the file's deployment, both parsed and as written."""
    fields, section = ({}, None) if arguments.config is None else read_config_file(arguments.config)
    deployment = None
    if section is not None:
        deployment = _read_deployment(section, arguments.config)
        parallel = deployment.parallel
        fields = {"mm_encoder_tp_mode": parallel.vision} | fields
        if deployment.topology is None:
            sizes = {"data_parallel_size": parallel.dp, "tensor_parallel_size": parallel.tp}
            fields = sizes | {"expert_parallel_size": parallel.ep} | fields
    given = {name: getattr(arguments, name) for name in arguments.setting_names}
    fields |= {name: value for name, value in given.items() if value is not None}
    return EngineConfig.of(fields), deployment, section


def _read_deployment(section: str | Mapping[str, object], source: str) -> Deployment:
    if isinstance(section, str):
        return load_deployment(section)
    try:
        return parse_deployment("deployment", section)
    except ValueError as error:
        raise ValueError(f"{source}: deployment: {error}") from None
