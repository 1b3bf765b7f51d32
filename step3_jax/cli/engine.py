"""The engine that a command's options ask for: on one device, on several, or with attention and FFN apart.

The options are the fields of `EngineConfig`. A file (`--config`) stands behind what the command line says.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from collections.abc import Iterable, Mapping

from step3_jax.cli.afd_option import AfdChoice, add_afd, load_afd_executor, read_afd_choice
from step3_jax.deployment import Deployment, load_deployment, parse_deployment
from step3_jax.engine.compile_cache import enable_compile_cache
from step3_jax.engine.config import (
    GROUPS,
    EngineConfig,
    Setting,
    format_config,
    kind_of,
    read_config_file,
    settings,
)
from step3_jax.engine.llm import LLM, read_parallel
from step3_jax.mesh import force_cpu_devices
from step3_jax.sharding import Parallel


@dataclasses.dataclass(frozen=True)
class EngineChoice:
    """What a command's options ask for.

    Attributes:
      config: The settings.
      parallel: How the model is spread over several devices; None for one device or with `afd`.
      afd: Attention and FFN on devices of their own; None for together.
    """

    config: EngineConfig
    parallel: Parallel | None
    afd: AfdChoice | None


def add_engine(parser: argparse.ArgumentParser, groups: Iterable[str] = GROUPS, *, without: Iterable[str] = ()) -> None:
    """Adds an option for each setting, and where attention and FFN run.

    Args:
      parser: Gets the options.
      groups: Of settings, see `config.GROUPS`.
      without: Settings that get no option, as the command has another of this name; a file may hold them.
    """
    groups, without = tuple(groups), tuple(without)
    titles = {name: parser.add_argument_group(GROUPS[name]) for name in groups}
    names = [name for name, (_, one) in settings().items() if one.group in titles and name not in without]
    for name in names:
        field, setting = settings()[name]
        _add_setting(titles[setting.group], name, field, setting)
    parser.set_defaults(setting_names=names)
    if "devices" in groups:
        add_afd(parser)
    group = parser.add_argument_group("configuration file")
    group.add_argument(
        "--config", metavar="FILE", help="YAML with any of these settings, and a section `deployment` for devices"
    )
    group.add_argument("--print-config", action="store_true", help="print the settings as such a file, and leave")


def print_config(arguments: argparse.Namespace) -> bool:
    """Prints the settings if that is what was asked for; True then.

    Raises:
      ValueError: As `read_engine`, before the first use of a device.
    """
    if not arguments.print_config:
        return False
    config, _, section = _read_settings(arguments)
    print(format_config(config, section), end="")
    return True


def read_engine(arguments: argparse.Namespace) -> EngineChoice:
    """Reads the options of `add_engine`: to be called before the first use of a device.

    Raises:
      ValueError: For values that are not allowed, options that do not go together, or that the devices do not fit.
    """
    config, deployment, _ = _read_settings(arguments)
    # With it the tensor and expert parallel sizes are the FFN side's.
    afd = read_afd_choice(arguments, config, deployment)
    parallel = read_parallel(config) if afd is None else None
    if parallel is not None:
        force_cpu_devices(parallel.num_devices)
    elif afd is None and config.attention_parallelism != "data":
        raise ValueError("--attention-parallelism tensor is for several devices: add --tensor-parallel-size")
    return EngineChoice(config, parallel, afd)


def read_config(arguments: argparse.Namespace) -> EngineConfig:
    """The settings of the file and the command line.

    Raises:
      ValueError: For values that are not allowed.
    """
    return _read_settings(arguments)[0]


def load_llm(choice: EngineChoice, folder: pathlib.Path) -> LLM:
    """The model in `folder`, loaded as the options say.

    Raises:
      ValueError: For everything that the checkpoint or the engine refuses.
    """
    enable_compile_cache()
    executor = load_afd_executor(choice.afd, folder, choice.config.dtype)
    config = choice.config
    if executor is not None:
        # They say how the FFN side is divided, which the executor has done.
        config = config.replace(tensor_parallel_size=1, expert_parallel_size=None)
    return LLM(folder, config=config, executor=executor)


def _read_settings(
    arguments: argparse.Namespace,
) -> tuple[EngineConfig, Deployment | None, str | Mapping[str, object] | None]:
    """Settings of the file and the command line, and the file's deployment, read and as it stands there."""
    fields, section = ({}, None) if arguments.config is None else read_config_file(arguments.config)
    deployment = None
    if section is not None:
        deployment = _read_deployment(section, arguments.config)
        if deployment.topology is None:
            division = deployment.division
            sizes = {"data_parallel_size": division.dp, "tensor_parallel_size": division.tp}
            fields = sizes | {"expert_parallel_size": division.ep} | fields
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


def _add_setting(group: argparse._ArgumentGroup, name: str, field: dataclasses.Field[object], setting: Setting) -> None:
    flags = (f"--{name.replace('_', '-')}", *setting.flags)
    default = setting.auto if field.default is None else str(field.default).lower()
    text = f"{setting.help} (default: {default})".replace("%", "%%")
    kind = kind_of(field)
    if kind is bool:
        group.add_argument(*flags, dest=name, action=argparse.BooleanOptionalAction, help=text)
    elif setting.choices:
        group.add_argument(*flags, dest=name, choices=setting.choices, help=text)
    else:
        group.add_argument(*flags, dest=name, type=kind, metavar=setting.metavar, help=text)
