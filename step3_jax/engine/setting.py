"""The description of a setting, once: checks, command-line options and tables in the docs all read it here.

A configuration is a frozen dataclass whose fields are made with `define`. Nothing here imports jax.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterable, Mapping

_KINDS: dict[str, type] = {
    "bool": bool,
    "int": int,
    "float": float,
    "str": str,
    "tuple[str, ...]": tuple,
    "Mapping[str, object]": dict,
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What help, docs and checks need to know about a field.

    Attributes:
      help: One sentence, without the default.
      group: The group of settings it is shown with.
      choices: All allowed values; empty if they cannot be listed.
      least: The smallest allowed number.
      most: The largest allowed number.
      auto: What None means; empty if None is not allowed.
      metavar: The placeholder for the value in help.
      flags: Short spellings on the command line.
      takes_several: Whether several texts may follow one option; otherwise the option is repeated.
    """

    help: str
    group: str
    choices: tuple[str, ...] = ()
    least: float | None = None
    most: float | None = None
    auto: str = ""
    metavar: str = "N"
    flags: tuple[str, ...] = ()
    takes_several: bool = False


def define(default: object, help: str, group: str, **values: object) -> typing.Any:
    """A field of a configuration: its default, and the values of its `Setting`."""
    setting = Setting(help, group, **values)  # type: ignore[arg-type]
    return dataclasses.field(default=default, metadata={"setting": setting})


def settings_of(config: type) -> dict[str, tuple[dataclasses.Field[object], Setting]]:
    """All fields of a configuration with their descriptions, in order."""
    return {field.name: (field, field.metadata["setting"]) for field in dataclasses.fields(config)}


def kind_of(field: dataclasses.Field[object]) -> type:
    """The type of a field's values: bool, int, float, str, tuple for texts, or dict for names with values; ignoring None."""
    return _KINDS[str(field.type).removesuffix(" | None")]


def format_default(field: dataclasses.Field[object]) -> str:
    """A default as help shows it."""
    setting: Setting = field.metadata["setting"]
    if field.default is None:
        return setting.auto
    if isinstance(field.default, tuple):
        return ", ".join(field.default) or setting.auto or "none"
    return str(field.default).lower()


def format_table(config: type) -> str:
    """All settings of a configuration as a Markdown table."""
    rows = ["| setting | default | meaning |", "| --- | --- | --- |"]
    for name, (field, setting) in settings_of(config).items():
        default = format_default(field) if field.default in (None, ()) else f"`{format_default(field)}`"
        choices = f" (one of {', '.join(f'`{choice}`' for choice in setting.choices)})" if setting.choices else ""
        rows.append(f"| `{name}` | {default} | {setting.help}{choices} |")
    return "\n".join(rows) + "\n"


def check_values(config: object) -> None:
    """Raises ValueError if a field has a value that is not allowed; the message names both and what is allowed."""
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        _check(field, getattr(config, field.name))


def check_name(name: str, names: Iterable[str], *, prefix: str = "", former: Mapping[str, str] | None = None) -> None:
    """Raises ValueError if a name is unknown; the message suggests the nearest one.

    Args:
      name: The name.
      names: The known names.
      prefix: Put before the message.
      former: The current names of settings that have been renamed.
    """
    known = list(names)
    if name in known:
        return
    nearest = difflib.get_close_matches((former or {}).get(name, name), known, 1, cutoff=0.5)
    hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(known)}"
    raise ValueError(f"{prefix}there is no setting {name!r}; {hint}")


def _check(field: dataclasses.Field[object], value: object) -> None:
    setting: Setting = field.metadata["setting"]
    kind = kind_of(field)
    # For texts, an empty tuple means none.
    may_be_none = bool(setting.auto) and kind is not tuple
    if value is None and may_be_none:
        return
    if kind in (str, tuple):
        _check_text(field.name, value, setting, is_list=kind is tuple)
        return
    if kind is dict:
        if not isinstance(value, Mapping):
            raise ValueError(
                f"{field.name} is {value!r}; names with values are needed{', or None' if may_be_none else ''}"
            )
        return
    is_kind = isinstance(value, (int, float) if kind is float else kind) and (
        kind is bool or not isinstance(value, bool)
    )
    least, most = setting.least, setting.most
    if is_kind and (least is None or value >= least) and (most is None or value <= most):  # type: ignore[operator]
        return
    if kind is bool:
        wanted = "True or False is needed"
    else:
        noun = "a whole number" if kind is int else "a number"
        wanted = f"{noun} of at least {least} is needed" if most is None else f"{noun} from {least} to {most} is needed"
    raise ValueError(f"{field.name} is {value!r}; {wanted}{', or None' if may_be_none else ''}")


def _check_text(name: str, value: object, setting: Setting, *, is_list: bool) -> None:
    if setting.choices:
        if value not in setting.choices:
            raise ValueError(f"{name} is {value!r}; allowed: {', '.join(setting.choices)}")
        return
    texts = value if isinstance(value, tuple) else (value,)
    if isinstance(value, tuple) != is_list or not all(isinstance(text, str) and text for text in texts):
        noun = "a tuple of texts, none of them empty," if is_list else "text"
        raise ValueError(f"{name} is {value!r}; {noun} is needed{', or None' if setting.auto and not is_list else ''}")
