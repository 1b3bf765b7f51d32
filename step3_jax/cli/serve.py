"""`step3 serve`: OpenAI's API over HTTP."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib

import jax

from step3_jax.cli.choice import find_model
from step3_jax.cli.engine import load_llm, print_config, read_engine
from step3_jax.cli.precheck import check_before_loading
from step3_jax.cli.process import leave_at_once, say
from step3_jax.engine.llm import LLM
from step3_jax.engine.setting import settings_of
from step3_jax.server.config import ServerConfig

_LIBRARIES = ("fastapi", "prometheus_client", "pydantic", "uvicorn")


def run(arguments: argparse.Namespace) -> int:
    """Serves until a signal.

    Returns:
      0 after a signal; 70 if the engine stopped.

    Raises:
      ValueError: For settings that are not allowed, an address that cannot be had, a library that is missing, and
        everything that the checkpoint or the engine refuses.
    """
    if print_config(arguments):
        return 0
    config = read_server_config(arguments)
    _require_libraries()
    # Modules of the service need these libraries.
    from step3_jax.server import log, process  # noqa: PLC0415

    choice = read_engine(arguments)
    if jax.process_count() > 1:
        raise ValueError("step3 serve runs in one process, and this one is of several: start it without step3 launch")
    folder = find_model(arguments)
    check_before_loading(folder, max_model_len=choice.config.max_model_len, needs_template=False)
    if not config.served_model_name:
        config = dataclasses.replace(config, served_model_name=(folder.resolve().name,))
    opened = process.open_socket(config)

    def load() -> LLM:
        return load_llm(choice, folder)

    say(f"loading {folder}; listening on {process.describe_address(opened, config)}")
    listener = log.start_log()
    ending = process.serve(load, config, opened, say)
    with contextlib.suppress(Exception):
        listener.stop()
    if ending.error is not None:
        raise ending.error
    if ending.has_threads:
        # They are inside of a compiler or a device.
        leave_at_once(ending.code)
    return ending.code


def read_server_config(arguments: argparse.Namespace) -> ServerConfig:
    """The settings of the service that were given.

    Raises:
      ValueError: For values that are not allowed.
    """
    given = {name: getattr(arguments, name) for name in settings_of(ServerConfig)}
    values = {
        name: tuple(value) if isinstance(value, list) else value for name, value in given.items() if value is not None
    }
    return ServerConfig.of(values)


def _require_libraries() -> None:
    for name in _LIBRARIES:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            raise ValueError(
                f"step3 serve needs {name}, which is not installed: pip install 'step3-jax[server]'"
            ) from None
