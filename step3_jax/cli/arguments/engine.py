"""Options of commands that run a model: one for each field of `EngineConfig`, and where attention and FFN run."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from step3_jax.cli.arguments.afd_devices import add_afd
from step3_jax.cli.arguments.setting import add_setting
from step3_jax.engine.config import GROUPS, settings


def add_engine(parser: argparse.ArgumentParser, groups: Iterable[str] = GROUPS, *, without: Iterable[str] = ()) -> None:
    """Adds an option for each setting, and where attention and FFN run.

    Args:
      parser: Gets the options.
      groups: Groups of settings, see `config.GROUPS`.
      without: Settings without an option, because the command has another option of that name; a file may hold them.
    """
    groups, without = tuple(groups), tuple(without)
    titles = {name: parser.add_argument_group(GROUPS[name]) for name in groups}
    names = [name for name, (_, one) in settings().items() if one.group in titles and name not in without]
    for name in names:
        field, setting = settings()[name]
        add_setting(titles[setting.group], field, setting)
    parser.set_defaults(setting_names=names)
    if "devices" in groups:
        add_afd(parser)
    group = parser.add_argument_group("configuration file")
    group.add_argument(
        "--config", metavar="FILE", help="YAML with any of these settings, and a section `deployment` for devices"
    )
    group.add_argument("--print-config", action="store_true", help="print the settings as such a file, and exit")
