"""Starts several processes: they meet, and join jax.distributed."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping

import jax

from step3_jax.rank import COORDINATOR, CPU_DEVICES, NUM_PROCESSES, PROCESS_ID, START_TIMEOUT

DEFAULT_START_TIMEOUT_S = 120
# Silence of a process after which JAX ends all others. Native threads beat: Python cannot hold them up.
HEARTBEAT_TIMEOUT_S = 30
_GO = b"go\n"
VARIABLES = (COORDINATOR, NUM_PROCESSES, PROCESS_ID, CPU_DEVICES)


def initialise_distributed(environment: Mapping[str, str] | None = None) -> bool:
    """Joins the processes that `step3 launch` started, before the first use of a device.

    Args:
      environment: Where to read `VARIABLES`; the process's environment if absent. STEP3_CPU_DEVICES alone gives one
        process several CPU devices.

    Returns:
      Whether there are several processes.

    Raises:
      ValueError: If the variables are incomplete or wrong.
      TimeoutError: If the processes do not find each other within STEP3_START_TIMEOUT seconds (120); the message of
        process 0 names those that are missing.
    """
    environment = os.environ if environment is None else environment
    found = {name: environment[name] for name in (COORDINATOR, NUM_PROCESSES, PROCESS_ID) if environment.get(name)}
    if environment.get(CPU_DEVICES):
        set_cpu_devices(read_number(environment, CPU_DEVICES, 1))
    if not found:
        return False
    missing = [name for name in (COORDINATOR, NUM_PROCESSES, PROCESS_ID) if name not in found]
    if missing:
        raise ValueError(f"{', '.join(found)} is set, but not {', '.join(missing)}: set all three or none")
    address = found[COORDINATOR]
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"{COORDINATOR} is {address!r}; host:port of the process with the number 0 is needed")
    num_processes = read_number(environment, NUM_PROCESSES, 1)
    rank = read_number(environment, PROCESS_ID, 0)
    if rank >= num_processes:
        raise ValueError(
            f"{PROCESS_ID} is {rank}; of {num_processes} processes the numbers are 0 to {num_processes - 1}"
        )
    timeout_s = read_start_timeout(environment)
    # JAX ends a process from C++ when others are missing, without saying which: so they meet first.
    _meet(host.strip("[]"), int(port), rank, num_processes, timeout_s)
    # The launcher already adds the coordinator to no_proxy.
    jax.config.update("jax_check_proxy_envs", False)
    jax.distributed.initialize(
        address,
        num_processes,
        rank,
        heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
        initialization_timeout=max(timeout_s, DEFAULT_START_TIMEOUT_S),
        cluster_detection_method="deactivate",
    )
    return num_processes > 1


def read_start_timeout(environment: Mapping[str, str]) -> int:
    """Seconds that the processes may take to find each other.

    Raises:
      ValueError: If the variable cannot be read.
    """
    return read_number(environment, START_TIMEOUT, 1) if environment.get(START_TIMEOUT) else DEFAULT_START_TIMEOUT_S


def too_few_cpu_devices(wanted: int) -> str:
    """What to do about it, for a message."""
    return (
        f"the number is fixed once JAX has begun to compute: set {CPU_DEVICES}={wanted} before the program starts, or "
        f'jax.config.update("jax_num_cpu_devices", {wanted}) in it before anything else'
    )


def set_cpu_devices(count: int) -> None:
    """Makes one CPU look like `count` devices.

    Raises:
      ValueError: If a computation has already started with fewer.
    """
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        have = len(jax.devices("cpu"))
        if have < count:
            raise ValueError(
                f"{count} CPU devices are wanted, but computing has begun with {have}; {too_few_cpu_devices(count)}"
            ) from None


def read_number(environment: Mapping[str, str], name: str, least: int) -> int:
    """A whole number from a variable.

    Raises:
      ValueError: If it is not one, or is less than `least`.
    """
    text = environment.get(name, "")
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"{name} is {text!r}; a whole number of at least {least} is needed")
    return int(text)


def _meet(host: str, port: int, rank: int, num_processes: int, timeout_s: int) -> None:
    """Returns once all processes are there: each tells process 0, at the coordinator's address, and waits for its answer."""
    deadline = time.monotonic() + timeout_s
    if rank:
        _report_to_coordinator(host, port, f"{rank} {num_processes}\n", deadline, timeout_s)
        return
    present: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(_listen(port))
        except OSError as error:
            raise ValueError(
                f"{COORDINATOR}: port {port} cannot be opened ({error.strerror}): another program has it, or a run before "
                "is not gone yet; name another port"
            ) from None
        while missing := [number for number in range(1, num_processes) if number not in present]:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                caller = stack.enter_context(server.accept()[0])
            except TimeoutError:
                raise TimeoutError(
                    f"of {num_processes} processes, number {', '.join(map(str, missing))} did not come to the coordinator "
                    f"at {host}:{port} within {timeout_s} s: see what they wrote, or raise {START_TIMEOUT}"
                ) from None
            words = _read_line(caller, deadline).split()
            # Anything else is not one of our processes.
            if len(words) == 2 and all(word.isdecimal() for word in words) and 0 < int(words[0]) < num_processes:
                if int(words[1]) != num_processes:
                    raise ValueError(
                        f"process {words[0]} is one of {words[1]}, but process 0 is one of {num_processes}"
                    )
                present[int(words[0])] = caller
        for caller in present.values():
            with contextlib.suppress(OSError):
                caller.sendall(_GO)


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _report_to_coordinator(host: str, port: int, line: str, deadline: float, timeout_s: int) -> None:
    reason = "it did not answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=left) as connection:
                connection.sendall(line.encode())
                if _read_line(connection, deadline) == _GO.decode().strip():
                    return
        except OSError as error:
            reason = error.strerror or str(error)
        time.sleep(0.1)
    raise TimeoutError(
        f"process {line.partition(' ')[0]} was not called on by the coordinator (process 0) at {host}:{port} within "
        f"{timeout_s} s: {reason}. Is process 0 running, is the port open between the hosts, have all others come?"
    )


def _read_line(connection: socket.socket, deadline: float) -> str:
    """One short line of text; whatever has arrived if it does not end in time."""
    connection.settimeout(max(0.01, deadline - time.monotonic()))
    data = b""
    with contextlib.suppress(OSError):
        while not data.endswith(b"\n") and len(data) < 64 and (part := connection.recv(64)):
            data += part
    return data.decode(errors="replace").strip()
