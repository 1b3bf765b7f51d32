"""How the processes of a run take their parts: rank 0 drives, the others work for it."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import jax

from step3_jax.channel.address import ChannelAddress
from step3_jax.channel.driver import DriverChannel
from step3_jax.channel.worker import WorkerChannel
from step3_jax.distributed import read_start_timeout
from step3_jax.engine.drive.executor import DrivenExecutor
from step3_jax.engine.drive.worker import CachedWorker, Worker, serve_calls
from step3_jax.engine.executor import Executor
from step3_jax.rank import ROLE, name_rank


def is_shared(executor: object) -> bool:
    """Whether something runs calls together with other processes."""
    return isinstance(executor, Executor | Worker) and executor.num_processes > 1


def take_part(load: Callable[[], Executor | Worker]) -> DriverChannel | None:
    """Takes this process's part in a model that all processes share; on rank 0 it only opens the channel to the workers.

    Args:
      load: Returns a worker's part; rank 0 calls it itself, and passes the result to `drive`.

    Returns:
      Rank 0's end of the channel; None with a single process.

    Raises:
      ValueError: If the channel's address is malformed or cannot be bound.
      SystemExit: On the other ranks, when rank 0 has said goodbye.
      Exception: On the other ranks, as `run_worker`.
    """
    if jax.process_count() == 1:
        return None
    if jax.process_index() > 0:
        run_worker(load)
        raise SystemExit(0)
    return DriverChannel(ChannelAddress.read(os.environ), jax.process_count() - 1)


def drive(own: Executor | Worker, channel: DriverChannel | None) -> Executor:
    """Rank 0's executor, as soon as all workers are ready.

    Args:
      own: Rank 0's own part.
      channel: From `take_part`; without one the executor is returned unchanged.

    Raises:
      ValueError: If rank 0 has no part of the cache.
      TimeoutError: If a worker does not connect.
      RunLostError: If one fails.
    """
    if not isinstance(own, Executor):
        raise ValueError("rank 0 is on the FFN side, but it drives the others: it must be on the attention side")
    if channel is None:
        return own
    channel.wait_for_workers(read_start_timeout(os.environ))
    channel.wait_until_ready()
    return DrivenExecutor(own, channel)


def run_worker(load: Callable[[], Executor | Worker]) -> None:
    """What a rank above 0 does: it loads its part of the model, and runs rank 0's calls until rank 0 says goodbye.

    Args:
      load: Returns the part. An error is reported to rank 0 before it is raised.

    Raises:
      TimeoutError: If rank 0 does not answer.
      RunLostError: If rank 0 is lost.
      Exception: Whatever loading or a call failed with.
    """
    address, rank = ChannelAddress.read(os.environ), jax.process_index()
    name = name_rank(os.environ.get(ROLE) or f"rank {rank}", rank, socket.gethostname())
    channel = WorkerChannel(address, rank, name)
    try:
        try:
            loaded = load()
        except Exception as error:
            channel.fail("loading weights", f"{type(error).__name__}: {' '.join(str(error).split())}")
            raise
        channel.wait_for_driver(read_start_timeout(os.environ))
        serve_calls(CachedWorker(loaded) if isinstance(loaded, Executor) else loaded, channel)
    finally:
        channel.close()
