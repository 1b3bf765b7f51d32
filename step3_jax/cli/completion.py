"""`step3 completion`: a script with which a shell completes commands, options, files and folders."""

from __future__ import annotations

import argparse
import importlib.util

from step3_jax.cli.main import COMMANDS, build_parser


def run(arguments: argparse.Namespace) -> int:
    """Prints the script.

    Raises:
      ValueError: If shtab, which writes it, is not installed.
    """
    print(write_completion(arguments.shell))
    return 0


def write_completion(shell: str) -> str:
    """The script for a shell, one of `SHELLS`; completing does not start step3.

    Raises:
      ValueError: If shtab, which writes it, is not installed.
    """
    if importlib.util.find_spec("shtab") is None:
        raise ValueError("step3 completion needs shtab, which is not installed: pip install 'step3-jax[completion]'")
    import shtab  # noqa: PLC0415

    parser = build_parser(*COMMANDS)
    _complete_paths(parser, shtab.FILE, shtab.DIRECTORY)
    return str(shtab.complete(parser, shell))


def _complete_paths(parser: argparse.ArgumentParser, file: object, folder: object) -> None:
    """Tells shtab which options take files and folders, as their metavars show."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                _complete_paths(sub, file, folder)
        metavar = action.metavar if isinstance(action.metavar, str) else ""
        if metavar.startswith("FILE"):
            action.complete = file  # type: ignore[attr-defined]
        elif metavar in ("MODEL", "PATH", "DIR", "SRC", "DST") or action.dest == "model":
            action.complete = folder  # type: ignore[attr-defined]
