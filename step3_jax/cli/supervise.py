"""Commands whose attention and FFN run in several processes: each process is a supervisor and its worker.

Nothing here imports jax: see `afd/supervisor.py`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence

from step3_jax.afd.line import Run
from step3_jax.afd.supervisor import supervise
from step3_jax.beacon import BEACON
from step3_jax.launch.net import next_port
from step3_jax.launch.options import WATCH, WATCH_TOKEN, check_port
from step3_jax.launch.place import read_topology
from step3_jax.layout.deployment import DEFAULT_DEADLINE_S, Topology

MODULE = "step3_jax.cli.main"
_COORDINATOR, _NUM_PROCESSES, _PROCESS_ID = "STEP3_COORDINATOR", "STEP3_NUM_PROCESSES", "STEP3_PROCESS_ID"
_START_TIMEOUT, _START_TIMEOUT_S = "STEP3_START_TIMEOUT", 120
# A worker on a busy machine may not be heard for a second.
_MIN_DEADLINE_S = 2.0


def supervise_rank(argv: Sequence[str], *, module: str = MODULE) -> int | None:
    """Runs a command in a worker, if it is one rank of several with `--afd`.

    Args:
      argv: Words of the command.
      module: The program that takes them.

    Returns:
      The exit code; None if this is no such rank, or is the worker itself.

    Raises:
      ValueError: If `--afd`, `--afd-deadline` or STEP3_WATCH cannot be read, or the supervisors' port is taken.
    """
    run = read_run(argv, os.environ)
    if run is None:
        return None
    command = [sys.executable, "-m", "step3_jax.launch.child", str(os.getpid()), module, *argv]
    # Ctrl-C ends an answer of `chat`, and not the conversation.
    return supervise(command, run, does_interrupt_end="chat" not in argv)


def read_run(argv: Sequence[str], environment: Mapping[str, str]) -> Run | None:
    """What the words and variables say of the run; see `supervise_rank`."""
    numbers = [environment.get(name, "") for name in (_NUM_PROCESSES, _PROCESS_ID)]
    if environment.get(BEACON) or not environment.get(_COORDINATOR) or not all(map(str.isdecimal, numbers)):
        return None
    num_processes, rank = map(int, numbers)
    topology = read_topology(argv) if rank < num_processes > 1 else None
    if topology is None:
        return None
    timeout = environment.get(_START_TIMEOUT, "")
    host, port = _read_watch(environment)
    return Run(
        rank=rank,
        roles=_name_roles(topology, num_processes),
        host=host,
        port=port,
        token=environment.get(WATCH_TOKEN, ""),
        deadline_s=_read_deadline(argv),
        start_timeout_s=int(timeout) if timeout.isdecimal() else _START_TIMEOUT_S,
    )


def _read_watch(environment: Mapping[str, str]) -> tuple[str, int]:
    """Host and port of rank 0's supervisor: beside the coordinator, if nothing else is said."""
    for name in (WATCH, _COORDINATOR):
        if text := environment.get(name):
            host, colon, port = text.rpartition(":")
            if not host or not colon:
                raise ValueError(f"{name} is {text!r}; host:port is needed")
            return host.strip("[]"), check_port(port) if name == WATCH else next_port(check_port(port))
    raise ValueError(f"{_COORDINATOR} is not set")


def _read_deadline(argv: Sequence[str]) -> float:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--afd-deadline", type=float, default=DEFAULT_DEADLINE_S)
    try:
        deadline_s: float = parser.parse_known_args(list(argv))[0].afd_deadline
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None
    if not deadline_s > 0:
        raise ValueError(f"--afd-deadline is {deadline_s:g}: give more than 0 s")
    return max(deadline_s, _MIN_DEADLINE_S)


def _name_roles(topology: Topology, num_processes: int) -> tuple[str, ...]:
    """The role of each process. A number that does not fit is the worker's to refuse."""
    each = max(1, topology.num_devices // num_processes)
    last = topology.num_devices - 1
    return tuple(topology.role_of(min(rank * each, last)) for rank in range(num_processes))
