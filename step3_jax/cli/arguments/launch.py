"""Options of `step3 launch`."""

from __future__ import annotations

import argparse
import shlex

from step3_jax.launch.launcher import MODULE
from step3_jax.launch.options import PLATFORMS, SSH


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.usage = (
        "step3 launch (--local N | --hosts A,B,... | under srun, mpirun, Kubernetes) [options] -- COMMAND ..."
    )
    parser.add_argument("words", nargs="*", metavar="COMMAND", help="the command to start, after --: generate -p Hello")
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
    start.add_argument(
        "--coordinator", metavar="HOST[:PORT]", help="address at which all processes reach the host of rank 0"
    )
    start.add_argument("--port", type=int, metavar="N", help="port of the coordinator (default: a free one)")
    start.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="an environment variable for all processes; may be repeated",
    )
    start.add_argument("--ssh", default=shlex.join(SSH), metavar="COMMAND", help="(default: %(default)s)")
    start.add_argument(
        "--python", metavar="PATH", help="interpreter on the other hosts (default: the same path as here)"
    )
    start.add_argument(
        "--directory", metavar="PATH", help="working folder on the other hosts (default: the same path as here)"
    )
    start.add_argument(
        "--module",
        default=MODULE,
        metavar="NAME",
        help="a Python module of your own that takes the words in place of step3, such as a script that uses LLM",
    )
    end = parser.add_argument_group("end")
    end.add_argument(
        "--grace", type=float, default=5.0, metavar="S", help="seconds from SIGTERM to SIGKILL (default: 5)"
    )
    end.add_argument(
        "--deadline",
        type=float,
        default=15.0,
        metavar="S",
        help="seconds of silence after which a host counts as lost (default: 15)",
    )
    end.add_argument(
        "--rank-deadline",
        type=float,
        default=60.0,
        metavar="S",
        help="seconds without progress after which a rank counts as lost (default: 60)",
    )
