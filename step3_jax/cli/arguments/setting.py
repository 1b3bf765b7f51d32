"""An option for a field of a configuration."""

from __future__ import annotations

import argparse
import dataclasses
import json

from step3_jax.cli.dtype import dtype_name
from step3_jax.engine.setting import Setting, format_default, kind_of


def add_setting(group: argparse._ArgumentGroup, field: dataclasses.Field[object], setting: Setting) -> None:
    """Adds the option of a field; its value is None if not given.

    Args:
      group: Gets the option.
      field: A field of a configuration.
      setting: Its description.
    """
    flags = (f"--{field.name.replace('_', '-')}", *setting.flags)
    text = f"{setting.help} (default: {format_default(field)})".replace("%", "%%")
    kind = kind_of(field)
    if kind is bool:
        group.add_argument(*flags, dest=field.name, action=argparse.BooleanOptionalAction, help=text)
    elif kind is dict:
        group.add_argument(*flags, dest=field.name, type=read_object, metavar=setting.metavar, help=text)
    elif kind is tuple and setting.takes_several:
        group.add_argument(*flags, dest=field.name, action="extend", nargs="+", metavar=setting.metavar, help=text)
    elif kind is tuple:
        group.add_argument(*flags, dest=field.name, action="append", metavar=setting.metavar, help=text)
    elif setting.choices:
        read = dtype_name(setting.choices)
        group.add_argument(*flags, dest=field.name, type=read, choices=setting.choices, help=text)
    else:
        group.add_argument(*flags, dest=field.name, type=kind, metavar=setting.metavar, help=text)


def read_object(text: str) -> dict[str, object]:
    """A JSON object of the command line."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is not a JSON object, such as {{"name": "value"}}')
    return value
