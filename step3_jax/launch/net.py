"""Hosts and ports before anything starts: parses them, and tries them until all hosts can reach a coordinator."""

from __future__ import annotations

import dataclasses
import errno
import pathlib
import queue
import shlex
import socket
import sys
import time
from collections.abc import Sequence

from step3_jax.channel.address import port_beside
from step3_jax.launch.cluster import Task
from step3_jax.launch.line import Connection, Event, Message
from step3_jax.launch.log import Log
from step3_jax.launch.options import LOOPBACK, SSH, LaunchOptions, check_port

_KEEPER = "step3_jax.launch.keeper"
_THIS_MACHINE = ("localhost", LOOPBACK, "::1")
# Kubernetes may cache for half a minute that a name is unknown.
_NAME_S = 120.0


def parse_hosts(text: str) -> tuple[str, ...]:
    """Splits "a,user@b,c".

    Raises:
      ValueError: If a name is empty, starts with a dash (ssh would read an option), holds blanks, or appears twice.
    """
    hosts = tuple(name.strip() for name in text.split(","))
    for name in hosts:
        if not name or name.startswith("-") or any(letter.isspace() for letter in name):
            raise ValueError(
                f"--hosts {text}: {name!r} is not a host; give names that ssh knows, such as a,b or me@a,me@b"
            )
    twice = sorted({name for name in hosts if hosts.count(name) > 1})
    if twice:
        raise ValueError(f"--hosts {text}: {twice[0]} appears twice; --processes-per-host starts several on each")
    return hosts


def is_this_machine(host: str) -> bool:
    """Whether a host is reached without ssh."""
    return host in _THIS_MACHINE


def bare_host(host: str) -> str:
    """A host without the user."""
    return host.rpartition("@")[2]


def split_coordinator(text: str) -> tuple[str, int | None]:
    """Splits "host", "host:port" or "[v6 address]:port".

    Raises:
      ValueError: If there is no host, or the port is invalid.
    """
    if text.startswith("["):
        host, _, port = text[1:].partition("]")
        port = port.removeprefix(":")
    elif text.count(":") > 1:
        host, port = text, ""
    else:
        host, _, port = text.partition(":")
    if not host:
        raise ValueError(f"--coordinator {text}: give HOST or HOST:PORT")
    return host, check_port(port) if port else None


def join_address(host: str, port: int) -> str:
    """ "host:port", with brackets around a version 6"""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def listen(port: int, host: str | None = None) -> socket.socket:
    """Binds a port on this machine, so that others can try to reach it.

    Args:
      port: The port; 0 for a free one.
      host: An address that must be this machine's; None for all of its addresses.

    Raises:
      ValueError: If the port is taken, or the address is not this machine's.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise ValueError(f"{host} is not known on {socket.gethostname()} ({error.strerror})") from None
    # Binding all of version 6 includes version 4.
    wanted = sorted(found, key=_prefers_version_6) if host is None else found
    problem: OSError | None = None
    for family, _, _, _, where in wanted:
        try:
            if host is None and family == socket.AF_INET6 and socket.has_dualstack_ipv6():
                return socket.create_server(where[:2], family=family, dualstack_ipv6=True)
            return socket.create_server(where[:2], family=family)
        except OSError as error:
            problem = error
            if error.errno == errno.EADDRINUSE:
                break
    if problem is not None and problem.errno == errno.EADDRINUSE:
        raise ValueError(f"port {port} on {socket.gethostname()} is in use: choose another with --port")
    if problem is not None and problem.errno == errno.EADDRNOTAVAIL:
        raise ValueError(
            f"{host} is not an address of {socket.gethostname()}, where rank 0 runs: name one of its own with --coordinator"
        )
    raise ValueError(f"cannot listen on {host or 'port'} {port} of {socket.gethostname()}: {problem}")


def reach(host: str, port: int, *, timeout_s: float) -> str | None:
    """Tries to connect.

    Returns:
      What is wrong, None if nothing is.
    """
    try:
        socket.create_connection((host, port), timeout=timeout_s).close()
    except socket.gaierror as error:
        return f"the name is not known ({error.strerror})"
    except TimeoutError:
        return f"no answer in {timeout_s:g} s: a firewall, or another network?"
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return None


def wait_for_name(host: str, *, timeout_s: float) -> None:
    """Waits until a host name resolves here: under Kubernetes that takes some seconds after its pod has started.

    Raises:
      ValueError: If it never does.
    """
    give_up_at = time.monotonic() + timeout_s
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except socket.gaierror as error:
            if time.monotonic() > give_up_at:
                raise ValueError(
                    f"the coordinator's name {host} is not known on {socket.gethostname()} after {timeout_s:g} s "
                    f"({error.strerror}): name another with --coordinator; under Kubernetes, is there the headless "
                    "service that the pods name as their subdomain?"
                ) from None
            time.sleep(1)


def own_address(environment: dict[str, str]) -> str | None:
    """The address at which the ssh client reached this machine; None without ssh.

    ssh's own names (aliases of its configuration) mean nothing to the other hosts, and a host's name often resolves to
    its own loopback address there.
    """
    words: Sequence[str] = environment.get("SSH_CONNECTION", "").split()
    # Client address and port, server address and port.
    return words[2].partition("%")[0] if len(words) == 4 else None


def _prefers_version_6(found: tuple[object, ...]) -> bool:
    return found[0] != socket.AF_INET6


@dataclasses.dataclass(frozen=True)
class Lines:
    """The lines to all hosts.

    Attributes:
      connections: One per host, in the order of the ranks.
      inbox: Receives the events of all of them.
      log: Shows their output.
    """

    connections: list[Connection]
    inbox: queue.SimpleQueue[Event]
    log: Log

    def ask(
        self, connections: Sequence[Connection], question: Message | None, answer: str | None, timeout_s: float
    ) -> list[Message]:
        """Sends a question to hosts and waits for one answer from each.

        Args:
          connections: The hosts.
          question: What to send; None to only wait.
          answer: Kind of the answer; None to not wait.
          timeout_s: Time for all answers together.

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
    """Refuses hosts on which the ranks would not run the same program.

    Args:
      hosts: Their names.
      hellos: Their hello messages.

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
      options: Has an address or port, if the user gave one.
      task: This task of a scheduler, the only one that is tried.
      hellos: The hosts' hello messages.

    Raises:
      ValueError: If the port is taken, or a host cannot reach it.
    """
    first, *others = lines.connections
    host, port = (None, None) if options.coordinator is None else split_coordinator(options.coordinator)
    port = options.port or port
    timeout_s = min(5.0, options.deadline_s / 2)
    if task is not None:
        host = task.coordinator
        if host is None:
            raise ValueError(f"{task.scheduler} does not say where task 0 runs: name its host with --coordinator")
        port = port or task.port
        if task.index == 0:
            # The other tasks start at other times, so only this one can try.
            listen = Message(kind="listen", port=port)
            if task.scheduler != "Kubernetes":
                # A pod's name comes from the service, and may not even resolve in the pod itself yet.
                listen["host"] = host
            lines.ask([first], listen, "listening", timeout_s + 5)
            lines.ask([first], Message(kind="release"), None, timeout_s)
        else:
            wait_for_name(host, timeout_s=_NAME_S)
        return join_address(host, port)
    if host is None and not others:
        host = LOOPBACK
    elif host is None:
        if is_this_machine(first.host):
            raise ValueError(
                f"the others cannot reach {first.host}: name this machine as they know it, in --hosts or --coordinator"
            )
        # The address that ssh arrived at, which needs no names.
        host = hellos[0]["address"] or bare_host(first.host)
    [listening] = lines.ask([first], Message(kind="listen", port=port or 0), "listening", timeout_s + 5)
    port = listening["port"]
    reach = Message(kind="reach", host=host, port=port, seconds=timeout_s)
    for connection, reached in zip(others, lines.ask(others, reach, "reached", timeout_s + 5), strict=True):
        if reached["text"]:
            raise ValueError(
                f"{connection.host} cannot reach the coordinator {join_address(host, port)} on {first.host}: "
                f"{reached['text']} (--coordinator names another address of it, --port an open port)"
            )
    lines.ask([first], Message(kind="release"), None, timeout_s)
    return join_address(host, port)


def choose_channel(
    lines: Lines, options: LaunchOptions, task: Task | None, hellos: Sequence[Message], coordinator: str
) -> str:
    """Chooses where rank 0 listens for the other ranks, and tries it as `choose_coordinator` does.

    Args:
      lines: As for `choose_coordinator`, like `options`, `task` and `hellos`.
      options: If the user or a task gives a port, the next one is used.
      task: See there.
      hellos: See there.
      coordinator: The result of `choose_coordinator`.

    Raises:
      ValueError: As `choose_coordinator`.
    """
    host, port = split_coordinator(coordinator)
    given = None if options.coordinator is None else split_coordinator(options.coordinator)[1]
    is_given = task is not None or options.port is not None or given is not None
    beside = port_beside(port) if is_given and port is not None else None
    options = dataclasses.replace(options, coordinator=host if ":" not in host else f"[{host}]", port=beside)
    # A free port that was tried is free again, so it may be found again.
    while (found := choose_coordinator(lines, options, task, hellos)) == coordinator:
        pass
    return found


def keeper_command(
    host: str,
    *,
    deadline_s: float,
    grace_s: float,
    ssh: Sequence[str] = SSH,
    python: str | None = None,
    directory: str | None = None,
) -> list[str]:
    """The command that starts the keeper of a host.

    Args:
      host: A name for ssh; "localhost" and its addresses need none.
      deadline_s: Silence of the launcher after which the keeper ends its ranks.
      grace_s: Time from SIGTERM to SIGKILL then.
      ssh: ssh with its options.
      python: The interpreter there; this one's path if absent.
      directory: Where it runs there; the same as here if absent.
    """
    options = ["-m", _KEEPER, "--deadline", f"{deadline_s:g}", "--grace", f"{grace_s:g}"]
    if is_this_machine(host):
        return [sys.executable, *options]
    there = shlex.join(["cd", directory or str(pathlib.Path.cwd())])
    return [*ssh, host, f"{there} && exec {shlex.join([python or sys.executable, *options])}"]


def _said(connection: Connection) -> str:
    return f" ({connection.last_noise()})" if connection.last_noise() else ""
