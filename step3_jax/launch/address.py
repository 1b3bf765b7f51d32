"""Addresses of hosts and ports: reading them, and trying them before anything starts."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Sequence

LOOPBACK = "127.0.0.1"
_THIS_MACHINE = ("localhost", LOOPBACK, "::1")


def parse_hosts(text: str) -> tuple[str, ...]:
    """Splits "a,user@b,c".

    Raises:
      ValueError: If a name is empty, begins with a dash (ssh would read an option), holds blanks, or comes twice.
    """
    hosts = tuple(name.strip() for name in text.split(","))
    for name in hosts:
        if not name or name.startswith("-") or any(letter.isspace() for letter in name):
            raise ValueError(
                f"--hosts {text}: {name!r} is no host; give names that ssh knows, such as a,b or me@a,me@b"
            )
    twice = sorted({name for name in hosts if hosts.count(name) > 1})
    if twice:
        raise ValueError(f"--hosts {text}: {twice[0]} comes twice; --processes-per-host starts several on each")
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
      ValueError: If there is no host, or the port is none.
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
    """ "host:port", with brackets around a version 6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_port(port: str | int) -> int:
    """Reads a port.

    Raises:
      ValueError: If it is none.
    """
    if not str(port).isdecimal() or not 1 <= int(port) <= 65535:
        raise ValueError(f"{port} is no port: give a number from 1 to 65535")
    return int(port)


def next_port(port: int) -> int:
    """The port beside one that was given: the supervisors of the ranks meet there (see `step3_jax/afd/supervisor.py`)."""
    return port + 1 if port < 65535 else port - 1


def listen(port: int, host: str | None = None) -> socket.socket:
    """Takes a port on this machine, so that others can try to reach it.

    Args:
      port: The port; 0 for a free one.
      host: Address of this machine that must be its own; None for all of its addresses.

    Raises:
      ValueError: If the port is taken, or the address is not this machine's.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise ValueError(f"{host} is not known on {socket.gethostname()} ({error.strerror})") from None
    # All of version 6 takes version 4 with it.
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
            f"{host} is no address of {socket.gethostname()}, where rank 0 runs: name one of its own with --coordinator"
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
    """Waits until a host's name is known here: under Kubernetes that takes some seconds after its pod has started.

    Raises:
      ValueError: If it never is.
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
    """The address by which the one who came over ssh reached this machine; None without ssh.

    ssh's own names (aliases of its configuration) mean nothing to the other hosts, and a host's name often resolves to
    its own loopback address there.
    """
    words: Sequence[str] = environment.get("SSH_CONNECTION", "").split()
    # Client address and port, server address and port.
    return words[2].partition("%")[0] if len(words) == 4 else None


def _prefers_version_6(found: tuple[object, ...]) -> bool:
    return found[0] != socket.AF_INET6
