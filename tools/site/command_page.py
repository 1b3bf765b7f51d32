"""The page of the command line, written from its parsers."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from step3_jax.cli.main import COMMANDS, build_parser

_TEXT = """# Command line

`step3 COMMAND --help` prints the same. Every command also takes `--debug` and `--log-level`, before or after its name.
`python -m step3_jax` is the same as `step3`.

| exit code | meaning |
| --- | --- |
| 0 | done |
| 1 | it failed |
| 2 | a mistake in what was given |
| 70 | the engine of a service has stopped |
| 75 | another process of the run failed |
| 130 | interrupted |
| 141 | the reader of the output left |
"""
# Said once, above.
_COMMON = {"help", "debug", "log_level"}


def write_commands() -> str:
    """Markdown: each command with its usage, and a table of options for each of its groups."""
    parts = [_TEXT]
    for name in COMMANDS:
        parser = _subcommands(build_parser(name))[name]
        parts += _write_command(parser, level=2)
    return "\n".join(parts)


def _write_command(parser: argparse.ArgumentParser, level: int) -> Iterator[str]:
    yield f"{'#' * level} {parser.prog}\n"
    if parser.description:
        yield f"{parser.description}\n"
    inner = _subcommands(parser)
    if not inner:
        usage = _Usage().format(parser)
        yield f"```text\n{usage}\n```\n"
    for group in parser._action_groups:
        rows = list(_write_rows(group))
        if rows:
            title = {"positional arguments": "arguments"}.get(group.title or "", group.title or "")
            yield "\n".join([f"| {title} | meaning |", "| --- | --- |", *rows, ""])
    for sub in inner.values():
        yield from _write_command(sub, level + 1)


class _Usage:
    """Usage of a command in one line: its options are in the tables."""

    def format(self, parser: argparse.ArgumentParser) -> str:
        if parser.usage:
            return parser.usage
        words = [action.metavar or action.dest for action in parser._actions if not action.option_strings]
        optional = {action.metavar or action.dest for action in parser._actions if action.nargs in ("?", "*")}
        shown = [f"[{word}]" if word in optional else str(word) for word in words]
        return " ".join([parser.prog, "[options]", *shown])


def _write_rows(group: argparse._ArgumentGroup) -> Iterator[str]:
    for action in group._group_actions:
        if action.dest in _COMMON or action.help == argparse.SUPPRESS or isinstance(action, argparse._SubParsersAction):
            continue
        yield f"| {_name(action)} | {_escape(_help(action))} |"


def _name(action: argparse.Action) -> str:
    value = _value(action)
    if not action.option_strings:
        return f"`{value}`"
    return "<br>".join(f"`{flag}{f' {value}' if value else ''}`" for flag in action.option_strings)


def _value(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    if action.metavar is not None:
        return action.metavar if isinstance(action.metavar, str) else " ".join(action.metavar)
    if action.choices is not None:
        return ",".join(str(choice) for choice in action.choices)
    return action.dest if not action.option_strings else action.dest.upper()


def _help(action: argparse.Action) -> str:
    values = {**vars(action), "choices": ", ".join(map(str, action.choices or ()))}
    return (action.help or "") % values


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")


def _subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """By name; empty if a command has none."""
    found = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(found[0].choices) if found else {}
