"""The process that compiles the decode programs of a deployment. Only it imports jax, so that arithmetic is immediate."""

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

# The command that the process runs.
_COMPILER = "step3_jax.cli.plan_compile"


@dataclasses.dataclass(frozen=True)
class Compilation:
    """The result of compiling, and its cost.

    Attributes:
      roles: Bytes by role name.
      seconds: Since the start of the process.
      peak_bytes: Peak memory of the process.
    """

    roles: dict[str, CompiledBytes]
    seconds: float
    peak_bytes: int


def compile_deployment(
    config: ModelConfig, deployment: Deployment, cache: CacheShape, speculation: Speculation | None = None
) -> Compilation:
    """Compiles in a process of its own, as the number of devices is fixed once jax computes.

    Args:
      config: From `layout.role.deployed_config`.
      deployment: What runs where.
      cache: Of each device that has one.
      speculation: How tokens are guessed; None for steps of one token.

    Raises:
      ValueError: If the deployment does not divide the model; the message says which would.
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
        # Then only the child holds the other end, so that its exit closes the pipe.
        sender.close()
        found: Compilation | Exception = receiver.recv()
    except EOFError:
        raise RuntimeError("the compiling process has died: is there enough memory for it (2 GiB)?") from None
    finally:
        # On an interrupt, a started process would keep compiling for seconds.
        if process.pid is not None:
            process.kill()
            process.join()
        receiver.close()
    if isinstance(found, Exception):
        raise found
    return dataclasses.replace(found, seconds=time.perf_counter() - start)


@contextlib.contextmanager
def _deferred_interrupts() -> Iterator[None]:
    """Delays a Ctrl-C in this block to its end, and shields a process that is started here from it.

    The parent handles it; a half-started process would complain about data that the parent has not sent. Does nothing
    outside the main thread.
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
        # A signal that only this thread can take is delivered as the mask is removed, still to the list.
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
