"""`step3 launch`: one command as many processes, on this machine, over ssh, or under a scheduler."""

from __future__ import annotations

import argparse
import os
import shlex

from step3_jax.launch.address import parse_hosts
from step3_jax.launch.connection import SSH
from step3_jax.launch.launcher import MODULE, launch
from step3_jax.launch.options import LaunchOptions
from step3_jax.launch.plan import PLATFORMS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.usage = (
        "step3 launch (--local N | --hosts A,B,... | under srun, mpirun, Kubernetes) [options] -- COMMAND ..."
    )
    parser.add_argument("words", nargs="*", metavar="COMMAND", help="what to start, after --: generate -p Hello")
    where = parser.add_argument_group("where")
    where.add_argument("--local", type=int, metavar="N", help="N processes on this machine")
    where.add_argument(
        "--hosts", metavar="A,B,...", help="machines that ssh reaches without a password; rank 0 is on A"
    )
    where.add_argument(
        "--processes-per-host",
        type=int,
        metavar="N",
        help="(default: what --afd, or --dp and --tp, of the command needs; else one for each GPU, or 1)",
    )
    where.add_argument(
        "--devices-per-process", type=int, default=1, metavar="N", help="on CPU (default: 1; on GPU always 1)"
    )
    where.add_argument("--platform", choices=PLATFORMS, default="auto", help="(default: cuda where all hosts have it)")
    start = parser.add_argument_group("start")
    start.add_argument("--coordinator", metavar="HOST[:PORT]", help="address at which all reach the host of rank 0")
    start.add_argument("--port", type=int, metavar="N", help="of the coordinator (default: a free one)")
    start.add_argument(
        "--env", action="append", default=[], metavar="NAME[=VALUE]", help="a variable for all; may be repeated"
    )
    start.add_argument("--ssh", default=shlex.join(SSH), metavar="COMMAND", help="(default: %(default)s)")
    start.add_argument(
        "--python", metavar="PATH", help="interpreter on the other hosts (default: the same path as here)"
    )
    start.add_argument("--directory", metavar="PATH", help="where to run there (default: the same path as here)")
    start.add_argument("--module", default=MODULE, help=argparse.SUPPRESS)
    end = parser.add_argument_group("end")
    end.add_argument(
        "--grace", type=float, default=5.0, metavar="S", help="seconds from SIGTERM to SIGKILL (default: 5)"
    )
    end.add_argument(
        "--deadline", type=float, default=15.0, metavar="S", help="a host silent for so long is lost (default: 15)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Starts the command and stays with it."""
    options = LaunchOptions(
        local=arguments.local,
        hosts=() if arguments.hosts is None else parse_hosts(arguments.hosts),
        processes_per_host=arguments.processes_per_host,
        devices_per_process=arguments.devices_per_process,
        platform=arguments.platform,
        coordinator=arguments.coordinator,
        port=arguments.port,
        grace_s=arguments.grace,
        deadline_s=arguments.deadline,
        environment=dict(_read_variable(text) for text in arguments.env),
        ssh=tuple(shlex.split(arguments.ssh)),
        remote_python=arguments.python,
        remote_directory=arguments.directory,
    )
    return launch(arguments.words, options, module=arguments.module)


def _read_variable(text: str) -> tuple[str, str]:
    """NAME=VALUE, or NAME with its value here.

    Raises:
      ValueError: If it is not set here.
    """
    name, equals, value = text.partition("=")
    if not name or (not equals and name not in os.environ):
        raise ValueError(f"--env {text}: give NAME=VALUE, or the NAME of a variable that is set here")
    return name, value if equals else os.environ[name]
