"""Figures as text and as a file."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping


def format_report(found: Mapping[str, object]) -> str:
    """Figures as markdown: one line for each value or list of values, then a table of each list of rows."""
    lines = [f"{name}: {_number(value)}" for name, value in found.items() if not isinstance(value, list | dict)]
    lines += [f"{name}: {_object(value)}" for name, value in found.items() if isinstance(value, dict)]
    lists = {name: values for name, values in found.items() if isinstance(values, list) and values}
    for name, values in lists.items():
        if not isinstance(values[0], dict):
            lines.append(f"{name}: {', '.join(map(_number, values))}")
    for name, rows in lists.items():
        if isinstance(rows[0], dict):
            lines += ["", f"{name}:", "", "| " + " | ".join(rows[0]) + " |", "|" + "--|" * len(rows[0])]
            lines += ["| " + " | ".join(_number(value) for value in row.values()) + " |" for row in rows]
    return "\n".join(lines)


def write_section(path: str | pathlib.Path, name: str, found: object) -> None:
    """Puts figures under a name into a JSON file, keeping those under other names: see `write_sections`."""
    write_sections(path, {name: found})


def write_sections(path: str | pathlib.Path, found: Mapping[str, object]) -> None:
    """Puts figures under their names into a JSON file, keeping those under other names.

    Raises:
      ValueError: If the file does not hold a JSON object.
    """
    target = pathlib.Path(path)
    sections = _read_object(target) if target.exists() else {}
    sections |= found
    new = target.with_name(target.name + ".new")
    new.write_text(json.dumps(sections, indent=2) + "\n", encoding="utf-8")
    new.replace(target)


def _read_object(path: pathlib.Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path} does not hold a JSON object: give a file of this benchmark, or a new one")
    return found


def _object(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_object(one)}" for name, one in value.items()) + "}"
    return _number(value)


def _number(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 1000 else str(round(value))
