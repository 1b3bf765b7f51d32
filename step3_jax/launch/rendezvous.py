"""Before anything starts: the lines to the hosts, their versions, and a coordinator that all of them reach."""

from __future__ import annotations

import dataclasses
import queue
import time
from collections.abc import Sequence

from step3_jax.launch import address
from step3_jax.launch.connection import Connection, Event
from step3_jax.launch.log import Log
from step3_jax.launch.options import LaunchOptions
from step3_jax.launch.protocol import Message
from step3_jax.launch.schedule import Task

# Kubernetes may keep for half a minute that a name is not known.
_NAME_S = 120.0


@dataclasses.dataclass(frozen=True)
class Lines:
    """The lines to all hosts.

    Attributes:
      connections: One for each, in the order of the ranks.
      inbox: Gets what comes from all of them.
      log: Shows what they print.
    """

    connections: list[Connection]
    inbox: queue.SimpleQueue[Event]
    log: Log

    def ask(
        self, connections: Sequence[Connection], question: Message | None, answer: str | None, timeout_s: float
    ) -> list[Message]:
        """Sends a question to hosts and waits for one answer of each.

        Args:
          connections: The hosts.
          question: What to send; None to wait alone.
          answer: Kind of the answer; None to wait for none.
          timeout_s: For all answers together.

        Returns:
          The answers, in the order of the hosts.

        Raises:
          ValueError: If one of them fails, leaves, or does not answer in time.
        """
        answers: dict[Connection, Message] = {}
        if question is not None:
            for connection in connections:
                connection.send(question)
        if answer is None:
            return []
        give_up_at = time.monotonic() + timeout_s
        while len(answers) < len(connections):
            missing = next(connection for connection in connections if connection not in answers)
            try:
                event = self.inbox.get(timeout=max(0.0, give_up_at - time.monotonic()))
            except queue.Empty:
                raise ValueError(f"{missing.host} did not answer in {timeout_s:g} s{_said(missing)}") from None
            message, sender = event.message, event.connection
            if sender is None:
                continue
            if message["kind"] == answer:
                answers[sender] = message
            elif message["kind"] == "failed":
                raise ValueError(f"{sender.host}: {message['text']}")
            elif message["kind"] == "closed":
                raise ValueError(f"cannot start on {sender.host}: exit code {message['code']}{_said(sender)}")
            elif message["kind"] == "noise":
                self.log.note_host(sender.host, message["text"])
        return [answers[connection] for connection in connections]


def check_versions(hosts: Sequence[str], hellos: Sequence[Message]) -> None:
    """Refuses hosts on which the ranks would not be the same program.

    Args:
      hosts: Their names.
      hellos: What they said of themselves.

    Raises:
      ValueError: If a version differs from the first host's.
    """
    ours = hellos[0]["versions"]
    for host, hello in zip(hosts, hellos, strict=True):
        for name, version in ours.items():
            found = hello["versions"].get(name, "not installed")
            if found != version:
                raise ValueError(
                    f"{name} is {found} on {host} and {version} on {hosts[0]}: install the same "
                    "on all hosts (--python names the interpreter there)"
                )


def choose_coordinator(lines: Lines, options: LaunchOptions, task: Task | None, hellos: Sequence[Message]) -> str:
    """Chooses the coordinator's "host:port", and tries it: the port is free, and all hosts reach it.

    Args:
      lines: The hosts; rank 0 is on the first.
      options: With an address or port, where the user gave one.
      task: This task of a scheduler, which alone is tried.
      hellos: What the hosts said of themselves.

    Raises:
      ValueError: If the port is taken, or a host cannot reach it.
    """
    first, *others = lines.connections
    host, port = (None, None) if options.coordinator is None else address.split_coordinator(options.coordinator)
    port = options.port or port
    timeout_s = min(5.0, options.deadline_s / 2)
    if task is not None:
        host = task.coordinator
        if host is None:
            raise ValueError(f"{task.scheduler} does not say where task 0 runs: name its host with --coordinator")
        port = port or task.port
        if task.index == 0:
            # The other tasks start at times of their own, so that only this one can try.
            listen = Message(kind="listen", port=port)
            if task.scheduler != "Kubernetes":
                # A pod's name comes from the service, and may not be known even to the pod itself yet.
                listen["host"] = host
            lines.ask([first], listen, "listening", timeout_s + 5)
            lines.ask([first], Message(kind="release"), None, timeout_s)
        else:
            address.wait_for_name(host, timeout_s=_NAME_S)
        return address.join_address(host, port)
    if host is None and not others:
        host = address.LOOPBACK
    elif host is None:
        if address.is_this_machine(first.host):
            raise ValueError(
                f"the others cannot reach {first.host}: name this machine as they know it, in --hosts or --coordinator"
            )
        # The address that ssh arrived at, which needs no names.
        host = hellos[0]["address"] or address.bare_host(first.host)
    [listening] = lines.ask([first], Message(kind="listen", port=port or 0), "listening", timeout_s + 5)
    port = listening["port"]
    reach = Message(kind="reach", host=host, port=port, seconds=timeout_s)
    for connection, reached in zip(others, lines.ask(others, reach, "reached", timeout_s + 5), strict=True):
        if reached["text"]:
            raise ValueError(
                f"{connection.host} cannot reach the coordinator {address.join_address(host, port)} on {first.host}: "
                f"{reached['text']} (--coordinator names another address of it, --port an open port)"
            )
    lines.ask([first], Message(kind="release"), None, timeout_s)
    return address.join_address(host, port)


def choose_watch(
    lines: Lines, options: LaunchOptions, task: Task | None, hellos: Sequence[Message], coordinator: str
) -> str:
    """Chooses where the supervisors of the ranks meet, and tries it as `choose_coordinator` does.

    Args:
      lines: As for `choose_coordinator`, and so are `options`, `task` and `hellos`.
      options: With a port of the user's, or a task's, it is the one beside it.
      task: See there.
      hellos: See there.
      coordinator: What `choose_coordinator` has found.

    Raises:
      ValueError: As `choose_coordinator`.
    """
    host, port = address.split_coordinator(coordinator)
    given = None if options.coordinator is None else address.split_coordinator(options.coordinator)[1]
    is_given = task is not None or options.port is not None or given is not None
    beside = address.next_port(port) if is_given and port is not None else None
    options = dataclasses.replace(options, coordinator=host if ":" not in host else f"[{host}]", port=beside)
    # A free port that was tried is free again, so the same one may be found.
    while (found := choose_coordinator(lines, options, task, hellos)) == coordinator:
        pass
    return found


def _said(connection: Connection) -> str:
    return f" ({connection.last_noise()})" if connection.last_noise() else ""
