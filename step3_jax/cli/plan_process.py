"""The process that compiles the decode programs of a deployment. It alone imports jax, so that arithmetic need not wait."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import signal
import threading
import time
from collections.abc import Iterator

from step3_jax.config import ModelConfig
from step3_jax.layout.deployment import Deployment
from step3_jax.planner.memory import CacheShape, CompiledBytes
from step3_jax.sampling.speculation import Speculation

# What the process runs.
_COMPILER = "step3_jax.cli.plan_compile"


@dataclasses.dataclass(frozen=True)
class Compilation:
    """What compiling gave, and what it took.

    Attributes:
      roles: Bytes by the name of the role.
      seconds: From the start of the process.
      peak_bytes: Most memory of the process.
    """

    roles: dict[str, CompiledBytes]
    seconds: float
    peak_bytes: int


def compile_deployment(
    config: ModelConfig, deployment: Deployment, cache: CacheShape, speculation: Speculation | None = None
) -> Compilation:
    """Compiles in a process of its own, as the number of devices is fixed once jax computes.

    Args:
      config: As `layout.role.deployed_config` gives it.
      deployment: What runs where.
      cache: Of each device that has one.
      speculation: How tokens are guessed; None for steps of one token.

    Raises:
      ValueError: If the deployment does not divide the model; the message says what would.
      RuntimeError: If the process dies.
    """
    start = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    given = sender, config, deployment, cache, speculation
    process = context.Process(target=_send_compilation, args=given, daemon=True)
    try:
        with _deferred_interrupts():
            process.start()
        # What is left is the child's alone, so that its end is the end of the pipe.
        sender.close()
        found: Compilation | Exception = receiver.recv()
    except EOFError:
        raise RuntimeError("the compiling process has died: is there enough memory for it (2 GiB)?") from None
    finally:
        # Interrupted, it would compile on for seconds, if it has been started.
        if process.pid is not None:
            process.kill()
            process.join()
        receiver.close()
    if isinstance(found, Exception):
        raise found
    return dataclasses.replace(found, seconds=time.perf_counter() - start)


@contextlib.contextmanager
def _deferred_interrupts() -> Iterator[None]:
    """A Ctrl-C that comes here is handled at the end, and a process that is started here never notices one.

    It is its parent's to answer, and half started it would complain of what the parent has not sent. Outside of the main
    thread nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # Started later, it would leave the signal unblocked.
    multiprocessing.resource_tracker.ensure_running()
    came: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        # A signal that only this thread could take is handled as the mask goes, still by the list.
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
        if came:
            signal.raise_signal(signal.SIGINT)


def _send_compilation(
    sender: multiprocessing.connection.Connection,
    config: ModelConfig,
    deployment: Deployment,
    cache: CacheShape,
    speculation: Speculation | None,
) -> None:
    try:
        sender.send(importlib.import_module(_COMPILER).compile_alone(config, deployment, cache, speculation))
    except Exception as error:
        sender.send(error)
