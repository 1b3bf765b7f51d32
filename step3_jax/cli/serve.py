"""`step3 serve`: OpenAI's API over HTTP."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import os
import sys
from collections.abc import Iterable

import yaml

from step3_jax.cli.choice import find_model
from step3_jax.cli.engine import load_llm, print_config, read_engine
from step3_jax.cli.log import read_level
from step3_jax.cli.precheck import check_before_loading
from step3_jax.cli.process import ERASE, leave_at_once, say
from step3_jax.cli.remote_option import KEY_VARIABLE
from step3_jax.engine.config import read_server_section
from step3_jax.engine.llm import LLM
from step3_jax.engine.setting import settings_of
from step3_jax.server.config import ServerConfig

_LIBRARIES = ("fastapi", "httpcore2", "prometheus_client", "pydantic", "uvicorn")


def run(arguments: argparse.Namespace) -> int:
    """Serves until a signal.

    Returns:
      0 after a signal; 70 if the engine stopped.

    Raises:
      ValueError: For settings that are not allowed, an address that cannot be used, a missing library, and
        everything that the checkpoint or the engine refuses.
    """
    config = read_server_config(arguments)
    if print_config(arguments):
        # Keys are secret.
        section = config.to_dict() | {"api_key": [], "metrics_key": None}
        print(yaml.safe_dump({"server": section}, sort_keys=False), end="")
        return 0
    require_libraries("serve")
    # Modules of the service need these libraries.
    from step3_jax.server import log, process  # noqa: PLC0415

    choice = read_engine(arguments)
    folder = find_model(arguments)
    check_before_loading(folder, max_model_len=choice.config.max_model_len, needs_template=False)
    if not config.served_model_name:
        config = dataclasses.replace(config, served_model_name=(folder.resolve().name,))
    opened = process.open_socket(config)

    loaded: list[LLM] = []

    def load() -> LLM:
        llm = load_llm(choice, folder)
        loaded.append(llm)
        if config.warm_up:
            llm.warm_up(_tell_progress)
        return llm

    # A log that cannot be written, for example on a full disk, must not hold up answers.
    with contextlib.suppress(OSError):
        say(f"loading {folder}; listening on {process.describe_address(opened, config)}")
    listener = log.start_log(read_level(arguments))
    ending = process.serve(load, config, opened, say)
    with contextlib.suppress(Exception):
        listener.stop()
    if ending.error is not None:
        raise ending.error
    if ending.has_threads or ending.code == process.DEAD_CODE:
        # They are inside a compiler or a device call, or native code waits for a lost process.
        for llm in loaded:
            llm.close()
        leave_at_once(ending.code)
    return ending.code


def _tell_progress(num_ready: int, num_all: int) -> None:
    """Shows how many programs are ready: on a terminal each time, elsewhere only at the start."""
    text = f"compiling programs: {num_ready} of {num_all}"
    with contextlib.suppress(OSError):
        if sys.stderr.isatty():
            sys.stderr.write(f"{ERASE}step3: {text}" if num_ready < num_all else ERASE)
            sys.stderr.flush()
        elif not num_ready:
            say(text)


def read_server_config(arguments: argparse.Namespace, names: Iterable[str] | None = None) -> ServerConfig:
    """The service's settings that were given, by an option or in the file; a key may be in the environment.

    Args:
      arguments: Has their options.
      names: Names of the settings that have options; all if absent.

    Raises:
      ValueError: For values that are not allowed.
    """
    section = {} if arguments.config is None else read_server_section(arguments.config)
    ServerConfig.of(section, source=f"{arguments.config}: server")
    given = {name: getattr(arguments, name) for name in (settings_of(ServerConfig) if names is None else names)}
    values = section | {name: value for name, value in given.items() if value is not None}
    key = os.environ.get(KEY_VARIABLE)
    if key and "api_key" in given:
        # Every user of the machine can read a command line.
        values.setdefault("api_key", (key,))
    return ServerConfig.of(values)


def require_libraries(command: str) -> None:
    """Raises ValueError if a library of the service is missing, and says how to install it."""
    for name in _LIBRARIES:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            raise ValueError(
                f"step3 {command} needs {name}, which is not installed: pip install 'step3-jax[server]'"
            ) from None
