"""Starts a command as many processes and supervises them to the end.

One keeper runs on each host (`keeper.py`), here or over ssh; the launcher asks them what the hosts have, tries the
coordinator's port, places the ranks, starts them, and supervises. Under a scheduler each task does this only for its own
ranks.
"""

from __future__ import annotations

import contextlib
import os
import queue
import secrets
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import BinaryIO, TextIO

from step3_jax.launch import net, place
from step3_jax.launch.cluster import HOW, Task, detect_task
from step3_jax.launch.line import Connection, Event, Message, Start, pack_input
from step3_jax.launch.log import Log
from step3_jax.launch.net import Lines, check_versions, choose_channel, choose_coordinator, keeper_command
from step3_jax.launch.options import (
    LOOPBACK,
    LaunchOptions,
    check_options,
    forwarded_environment,
    rank_environment,
)
from step3_jax.launch.place import Need, read_need, reads_input
from step3_jax.launch.supervisor import Supervisor, catch_signals, send_beats
from step3_jax.rank import CHANNEL, SECRET

MODULE = "step3_jax.cli.main"
# Enough for the slowest ssh, and for starting Python from a shared file system.
_HELLO_S = 60.0
_INPUT_BYTES = 2**15


def launch(
    words: Sequence[str],
    options: LaunchOptions,
    *,
    module: str = MODULE,
    stdout: BinaryIO | None = None,
    stderr: TextIO | None = None,
) -> int:
    """Runs `python -m MODULE WORDS` as many processes that know about each other.

    Each gets STEP3_COORDINATOR (host:port), STEP3_NUM_PROCESSES and STEP3_PROCESS_ID, its device, and settings of XLA
    and NCCL (`options.py`). Rank 0 gets our standard input if the command reads it
    (`place.reads_input`), the others get none. No process is left behind, whatever happens.

    Args:
      words: The command, such as `["generate", "-p", "Hello"]`.
      options: Where and how.
      module: The program that takes the words.
      stdout: Receives rank 0's standard output unchanged; ours if absent.
      stderr: Receives all other output, line by line, prefixed with the rank; ours if absent.

    Returns:
      0 if all ranks ended with 0, else the code of the one that failed (128 + n for signal n), or 75 if it made no progress;
      255 for a lost host; 128 + n if signal n ended the launcher itself, but 0 if that shut `serve` down cleanly.

    Raises:
      ValueError: Before anything is started: if options conflict, a host cannot be reached or has
        another version, the port is taken, or the number of processes does not fit the command's devices.
      BrokenPipeError: If the reader of standard output left; all ranks have ended then.
    """
    # A user's own module may take no words.
    check_options(words if module == MODULE else [module, *words], options)
    need = read_need(words)
    task = None
    if options.local is None and not options.hosts:
        given = None if options.coordinator is None else net.split_coordinator(options.coordinator)[0]
        task = detect_task(os.environ, socket.gethostname(), given)
        if task is None:
            raise ValueError(f"where to start? {HOW}; under Slurm, Open MPI or Kubernetes neither is needed")
    log = Log(sys.stdout.buffer if stdout is None else stdout, sys.stderr if stderr is None else stderr)
    inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
    names = options.hosts or ("localhost" if task is None else socket.gethostname(),)
    connections: list[Connection] = []
    try:
        for name in names:
            # Only the hosts of --hosts are elsewhere.
            where = name if options.hosts else LOOPBACK
            command = keeper_command(
                where,
                deadline_s=options.deadline_s,
                grace_s=options.grace_s,
                ssh=options.ssh,
                python=options.remote_python,
                directory=options.remote_directory,
            )
            connections.append(Connection(name, command, inbox))
        with send_beats(connections, options.deadline_s / 5):
            return _Launch(words, module, options, need, task, Lines(connections, inbox, log)).run()
    finally:
        _leave(connections, options.grace_s)


class _Launch:
    """The steps from connecting to the exit code."""

    def __init__(
        self,
        words: Sequence[str],
        module: str,
        options: LaunchOptions,
        need: Need | None,
        task: Task | None,
        lines: Lines,
    ) -> None:
        self._words = list(words)
        self._module = module
        self._options = options
        self._need = need
        self._topology = None if need is None else need.topology
        self._task = task
        self._lines = lines
        self._user = dict(os.environ) | dict(options.environment)

    def run(self) -> int:
        options, task, lines, log = self._options, self._task, self._lines, self._lines.log
        hellos = lines.ask(lines.connections, None, "hello", _HELLO_S)
        names = [connection.host for connection in lines.connections]
        check_versions(names, hellos)
        hosts = [place.Host(name, tuple(hello["gpus"])) for name, hello in zip(names, hellos, strict=True)]
        platform = place.choose_platform(options.platform, hosts, self._user)
        if platform == "cuda" and options.devices_per_process != 1:
            raise ValueError("--devices-per-process is for CPU: on GPU a process has one device")
        ranks, num_processes = self._place(hosts, platform)
        coordinator = choose_coordinator(lines, options, task, hellos)
        channel = {}
        if num_processes > 1 and CHANNEL not in self._user:
            channel[CHANNEL] = choose_channel(lines, options, task, hellos, coordinator)
        # A scheduler's tasks have no way to agree on one.
        if num_processes > 1 and task is None:
            channel[SECRET] = self._user.get(SECRET) or secrets.token_hex(16)
        if task is None:
            log.note(f"{num_processes} process(es) on {len(hosts)} host(s), {platform}, coordinator {coordinator}")
            for line in place.format_table(ranks, hosts):
                log.note("  " + line)
        else:
            for rank in ranks:
                log.note(
                    f"{task.scheduler}: rank {rank.rank} of {num_processes} on {hosts[0].name}, device {rank.devices}, "
                    f"role {rank.role}, coordinator {coordinator}"
                )
        supervisor = Supervisor(
            lines.connections,
            ranks,
            lines.inbox,
            log,
            deadline_s=options.deadline_s,
            rank_deadline_s=options.rank_deadline_s,
            grace_s=options.grace_s,
            shutdown_s=options.shutdown_s,
        )
        with catch_signals(lines.inbox):
            for index, connection in enumerate(lines.connections):
                starts = [
                    self._start(rank, connection, num_processes, coordinator, channel)
                    for rank in ranks
                    if rank.host == index
                ]
                connection.send(Message(kind="start", processes=starts))
                if any(start["has_input"] for start in starts):
                    threading.Thread(target=_pass_input, args=(connection,), daemon=True).start()
            return supervisor.run()

    def _place(self, hosts: list[place.Host], platform: str) -> tuple[list[place.Rank], int]:
        """The ranks that are started from here, and the total number."""
        options, task, need, topology = self._options, self._task, self._need, self._topology
        devices = options.devices_per_process
        if task is None:
            per_host = place.count_processes(
                hosts,
                per_host=options.processes_per_host if options.local is None else options.local,
                platform=platform,
                need=need,
                devices_per_process=devices,
            )
            ranks = [
                rank
                for index, host in enumerate(hosts)
                for rank in place.place_ranks(
                    host,
                    host_index=index,
                    first_rank=index * per_host,
                    count=per_host,
                    platform=platform,
                    topology=topology,
                    devices_per_process=devices,
                )
            ]
            return ranks, len(ranks)
        if task.num_local > 1 and (options.processes_per_host or 1) > 1:
            raise ValueError(
                f"{task.scheduler} starts {task.num_local} tasks on this host, each for one process: leave out "
                "--processes-per-host, or start one task on each host"
            )
        # The other tasks' hosts are assumed to be like this one.
        per_task = place.count_processes(
            hosts * task.num_tasks,
            per_host=1 if task.num_local > 1 else options.processes_per_host,
            platform=platform,
            need=need,
            devices_per_process=devices,
        )
        ranks = place.place_ranks(
            hosts[0],
            host_index=0,
            first_rank=task.index * per_task,
            count=per_task,
            platform=platform,
            topology=topology,
            devices_per_process=devices,
            first_local=task.local_index,
            num_local=max(per_task, task.num_local),
        )
        return ranks, per_task * task.num_tasks

    def _start(
        self, rank: place.Rank, connection: Connection, num_processes: int, coordinator: str, channel: Mapping[str, str]
    ) -> Start:
        is_here = not self._options.hosts or net.is_this_machine(connection.host)
        environment = {} if is_here else forwarded_environment(os.environ)
        environment |= dict(self._options.environment)
        environment |= rank_environment(
            rank=rank.rank,
            role=rank.role,
            num_processes=num_processes,
            coordinator=coordinator,
            gpu=rank.gpu,
            cpu_devices=self._options.devices_per_process,
            user=self._user,
        )
        environment |= channel
        has_input = rank.rank == 0 and reads_input(self._words)
        return Start(
            rank=rank.rank, module=self._module, words=self._words, environment=environment, has_input=has_input
        )


def _pass_input(connection: Connection) -> None:
    """Forwards our standard input to rank 0, up to its end."""
    data = b"more"
    while data:
        try:
            data = os.read(0, _INPUT_BYTES)
        except OSError:
            data = b""
        connection.send(pack_input(0, data))


def _leave(connections: Sequence[Connection], grace_s: float) -> None:
    """Closes all lines. The keepers end anything that still runs, in bounded time."""
    for connection in connections:
        connection.close()
    give_up_at = time.monotonic() + grace_s + 5
    for connection in connections:
        with contextlib.suppress(OSError):
            if not connection.wait(max(0.1, give_up_at - time.monotonic())):
                connection.kill()
