"""The command `step3`: finds the sub-command, runs it, and turns errors into one line and an exit code.

Exit codes: 0 done; 1 failed; 2 a usage error; 75 another process of the run failed; 130 interrupted; 141
the reader of the output left.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from step3_jax import __version__
from step3_jax.channel.failure import RunLostError
from step3_jax.cli.log import add_log_options, read_level, start_log
from step3_jax.cli.process import (
    INTERRUPTED,
    INTERRUPTED_CODE,
    handle_interrupts,
    leave_at_once,
    repair_streams,
    say,
)
from step3_jax.gpu import claim_memory
from step3_jax.rank import COORDINATOR, CPU_DEVICES, NUM_PROCESSES, PROCESS_ID

# Each has two modules of its name: one in `arguments` with `add_arguments(parser)`, free of jax so that `--help` need not
# wait for it, and one here with `run(arguments) -> exit code`. Only those of the chosen command are imported.
COMMANDS = {
    "generate": "answer one prompt, with or without images",
    "chat": "talk with the model in the terminal",
    "run-batch": "answer a file of requests, in OpenAI's batch format",
    "inspect": "show what a checkpoint holds, and whether it is complete",
    "convert": "convert a checkpoint: released layout, Orbax, BF16, block-FP8",
    "serve": "serve OpenAI's API over HTTP",
    "launch": "start a command as several processes: here, over ssh, under Slurm, Open MPI or Kubernetes",
    "afd": "trace and draw a run with attention and FFN on separate devices",
    "plan": "plan a deployment of a large model without its weights: memory, cost, search, simulation",
    "bench": "measure the speed of this machine, or of a service",
    "env": "show versions, devices and folders, for a bug report",
    "completion": "print a completion script for a shell",
}


# If one is set, this is one of several processes, or has several CPU devices.
PROCESS_VARIABLES = (COORDINATOR, NUM_PROCESSES, PROCESS_ID, CPU_DEVICES)
# With several processes, rank 0 runs these commands, and the others work for it.
_DRIVEN = ("generate", "chat", "run-batch", "serve")
# EX_TEMPFAIL of sysexits.h: another process of the run failed.
LOST_CODE = 75


class UsageError(ValueError):
    """The command line cannot be read."""


class _Parser(argparse.ArgumentParser):
    """argparse, except that an error is an exception instead of five lines of usage, and names its command."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Like argparse's, but refuses leftover words: the innermost command knows its options best."""
        found, left = super().parse_known_args(args, namespace)
        if left:
            self.error(_describe_left_over(left, self.prog, self.format_help()))
        return found, left


def build_parser(*wanted: str | None) -> argparse.ArgumentParser:
    """The parser of the whole command line.

    Args:
      *wanted: The sub-commands whose options are needed; the others are only named. None means none.
    """
    parser = _Parser(prog="step3", description="Run Step3, a vision-language mixture of experts, in JAX.")
    parser.add_argument("--version", action="version", version=f"step3-jax {__version__}")
    add_log_options(parser)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        add_log_options(sub)
        if name in wanted:
            importlib.import_module(f"step3_jax.cli.arguments.{_module_name(name)}").add_arguments(sub)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: Arguments without the program's name. If absent, this process is the command: it uses its own arguments,
        repairs its standard streams, and an interrupt ends it without the interpreter's clean-up.

    Returns:
      The exit code.
    """
    if argv is not None:
        return _run_guarded(list(argv))
    # First: a file that the handler opens must not get the descriptor of a closed stream.
    repair_streams()
    handler = handle_interrupts()
    code = _run_guarded(sys.argv[1:], has_log=True)
    if handler is not None and handler.was_raised:
        leave_at_once(code)
    return code


def _run_guarded(argv: list[str], *, has_log: bool = False) -> int:
    """The exit code, whatever happens; `has_log` says that the log may be shown, because this process is the command."""
    try:
        code = _run(argv, has_log=has_log)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as interrupt:
        say(str(interrupt) or INTERRUPTED)
        return INTERRUPTED_CODE
    except BrokenPipeError:
        # The interpreter flushes once more at exit, which must not fail again.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except RunLostError as error:
        say(f"error: {error}")
        # Native code may wait for the other ranks indefinitely.
        leave_at_once(LOST_CODE)
    except Exception as error:
        if "--debug" in argv:
            traceback.print_exc()
        is_mistake = isinstance(error, ValueError | FileNotFoundError | PermissionError) or _is_wrong_kind(error)
        say(f"error: {_describe(error, is_mistake)}")
        return 2 if is_mistake else 1


def _run(argv: list[str], *, has_log: bool) -> int:
    command = _find_command(argv)
    is_rank = command != "launch" and any(os.environ.get(name) for name in PROCESS_VARIABLES)
    try:
        arguments = build_parser(command).parse_args(argv)
    except SystemExit as leave:  # --help and --version have printed their text.
        return leave.code if isinstance(leave.code, int) else 0
    if has_log:
        start_log(read_level(arguments))
    # If a service elsewhere does the work, nothing here may load a model or touch a device.
    remote = getattr(arguments, "remote_module", None)
    if remote is not None:
        return int(importlib.import_module(f"step3_jax.cli.{remote}").run(arguments))
    # Both before the first use of a device.
    if hasattr(arguments, "setting_names"):
        config = importlib.import_module("step3_jax.cli.engine").read_config(arguments)
        claim_memory(share=config.gpu_memory_utilization)
    elif command != "launch":
        claim_memory()
    module = _module_name(arguments.command)
    if is_rank:
        is_one_of_several = importlib.import_module("step3_jax.distributed").initialise_distributed()
        if is_one_of_several and arguments.command in _DRIVEN and int(os.environ[PROCESS_ID]) > 0:
            module = "worker"
    return int(importlib.import_module(f"step3_jax.cli.{module}").run(arguments))


def _find_command(argv: Sequence[str]) -> str | None:
    """The sub-command: the first word that names one, as no option before it takes such a word."""
    return next((word for word in argv if word in COMMANDS), None)


def _module_name(command: str) -> str:
    return command.replace("-", "_")


def _describe_left_over(words: Sequence[str], prog: str, help_text: str) -> str:
    """What is wrong with words that a command does not take, and the probably intended option."""
    given = words[0].partition("=")[0]
    if not given.startswith("-"):
        return f"{given!r} is an unexpected argument"
    if prog == "step3 launch":
        return (
            f"{given} is not an option of step3 launch: the command to start comes after --, as in "
            "step3 launch --local 2 -- generate -p Hello"
        )
    known = sorted(set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", help_text)))
    nearest = difflib.get_close_matches(given, known, n=1)
    return f"{prog} has no option {given}" + (f", did you mean {nearest[0]}?" if nearest else "")


def _is_wrong_kind(error: Exception) -> bool:
    return isinstance(error, IsADirectoryError | NotADirectoryError)


def _describe(error: Exception, is_mistake: bool) -> str:
    """One line for an error."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    text = " ".join(str(error).split())
    return text if is_mistake and text else f"{type(error).__name__}: {text} (--debug shows where)"


if __name__ == "__main__":
    sys.exit(main())
