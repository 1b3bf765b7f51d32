"""`step3 launch`: runs one command as many processes, on this machine, over ssh, or under a scheduler."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence

from step3_jax.cli.process import interruptible
from step3_jax.engine.config import read_server_section
from step3_jax.launch.launcher import launch
from step3_jax.launch.net import parse_hosts
from step3_jax.launch.options import LaunchOptions
from step3_jax.server.config import ServerConfig


def run(arguments: argparse.Namespace) -> int:
    """Starts the command and waits for it."""
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
        rank_deadline_s=arguments.rank_deadline,
        shutdown_s=_read_shutdown(arguments.words),
        environment=dict(_read_variable(text) for text in arguments.env),
        ssh=tuple(shlex.split(arguments.ssh)),
        remote_python=arguments.python,
        remote_directory=arguments.directory,
    )
    # If interrupted before the launcher handles signals itself, it still ends the processes it has started.
    with interruptible():
        return launch(arguments.words, options, module=arguments.module)


def _read_shutdown(words: Sequence[str]) -> float:
    """Seconds that the service needs to shut down cleanly; 0 for other commands.

    Raises:
      ValueError: If they cannot be read.
    """
    if not words or words[0] != "serve":
        return 0.0
    parser = argparse.ArgumentParser(prog="step3 serve", add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--shutdown-timeout", type=float)
    parser.add_argument("--config")
    try:
        found = parser.parse_known_args(list(words))[0]
    except argparse.ArgumentError as error:
        raise ValueError(f"in the command to launch: {error}") from None
    values = {} if found.config is None else read_server_section(found.config)
    if found.shutdown_timeout is not None:
        values["shutdown_timeout"] = found.shutdown_timeout
    return ServerConfig.of(
        {name: value for name, value in values.items() if name == "shutdown_timeout"}
    ).shutdown_timeout


def _read_variable(text: str) -> tuple[str, str]:
    """NAME=VALUE, or NAME with its value in this environment.

    Raises:
      ValueError: If it is not set here.
    """
    name, equals, value = text.partition("=")
    if not name or (not equals and name not in os.environ):
        raise ValueError(f"--env {text}: give NAME=VALUE, or the NAME of a variable that is set here")
    return name, value if equals else os.environ[name]
