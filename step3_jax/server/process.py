"""The service's process: it listens before the model is loaded, and drains when told to shut down.

The event loop runs in the main thread, the engine in its own thread, and the model is loaded in a third.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

import uvicorn
from prometheus_client import disable_created_metrics

from step3_jax.engine.llm import LLM
from step3_jax.server.app import build_app
from step3_jax.server.config import ServerConfig
from step3_jax.server.service import Service

_LOG = logging.getLogger(__name__)

# EX_SOFTWARE of sysexits.h: the engine has stopped.
DEAD_CODE = 70
# How long clients have to receive what was sent last.
_GRACE_S = 0.5
# How long connections have to close, and the engine to end its step.
_CLOSE_S = 2
# Longer than proxies keep idle connections to a server, so that none sends into one that is being closed.
_KEEP_ALIVE_S = 75
_POLL_S = 0.05


@dataclasses.dataclass(frozen=True)
class Ending:
    """How the service ended.

    Attributes:
      code: Exit code for the process.
      has_threads: Whether threads still compute, so that the interpreter cannot exit cleanly.
      error: Why the model could not be loaded; None if it was.
    """

    code: int
    has_threads: bool
    error: BaseException | None = None


def open_socket(config: ServerConfig) -> socket.socket:
    """Binds the address, so that a mistake in it is reported before anything is loaded.

    Raises:
      ValueError: If it cannot be bound.
    """
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        opened = socket.socket(family, kind, protocol)
        try:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.bind(address)
            opened.listen(2048)
        except BaseException:
            opened.close()
            raise
        opened.setblocking(False)
        return opened
    except (OSError, UnicodeError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(
            f"--host {config.host} --port {config.port}: {reason}; choose another address or port"
        ) from None


def describe_address(opened: socket.socket, config: ServerConfig) -> str:
    """The address for clients."""
    host, port = opened.getsockname()[:2]
    return f"{'https' if config.ssl_keyfile else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


def serve(load: Callable[[], LLM], config: ServerConfig, opened: socket.socket, say: Callable[[str], None]) -> Ending:
    """Serves until a signal, or until the engine stops.

    Args:
      load: Returns the model with all programs compiled; called in a thread.
      config: The settings.
      opened: Where to listen, from `open_socket`.
      say: Writes a note to the user who started it.

    Returns:
      How it ended, including when the model could not be loaded.
    """
    # A second series for each counter and histogram, with its start time; dashboards do not use it.
    disable_created_metrics()
    return asyncio.run(_Process(load, config, opened, say).run())


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handlers: draining comes before shutdown."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Process:
    """One run of the service."""

    def __init__(
        self, load: Callable[[], LLM], config: ServerConfig, opened: socket.socket, say: Callable[[str], None]
    ) -> None:
        self._load = load
        self._config = config
        self._opened = opened
        self._out = say
        self._app = build_app(None, config)
        self._service: Service = self._app.state.service
        self._code: asyncio.Future[int]
        self._error: BaseException | None = None
        self._draining: asyncio.Task[None] | None = None

    async def run(self) -> Ending:
        loop = asyncio.get_running_loop()
        self._code = loop.create_future()
        server = _Server(
            uvicorn.Config(
                self._app,
                log_config=None,
                access_log=False,
                lifespan="off",
                ws="none",
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=_CLOSE_S,
                ssl_keyfile=self._config.ssl_keyfile,
                ssl_certfile=self._config.ssl_certfile,
            )
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._handle_signal)
        self._service.on_death(lambda: self._handle_death(loop))
        serving = asyncio.create_task(server.serve(sockets=[self._opened]))
        loader = threading.Thread(target=self._run_load, args=(loop,), name="step3-load", daemon=True)
        loader.start()
        serving.add_done_callback(lambda _: self._finish(1))
        code = await self._code
        server.should_exit = True
        with contextlib.suppress(asyncio.CancelledError):
            await serving
        has_ended = await asyncio.to_thread(self._service.close, _CLOSE_S)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
        return Ending(code, loader.is_alive() or not has_ended, self._error)

    def _say(self, text: str) -> None:
        # A full disk must not stop it.
        with contextlib.suppress(OSError):
            self._out(text)

    def _run_load(self, loop: asyncio.AbstractEventLoop) -> None:
        # Tracing makes millions of objects and hardly a cycle: looking for cycles takes a tenth of the start.
        gc.disable()
        try:
            llm = self._load()
            # What is there now stays: looking through it again would hold up all streams for a tenth of a second.
            gc.collect()
            gc.freeze()
        except BaseException as error:
            caught = error
            _call(loop, lambda: self._handle_failed_load(caught))
        else:
            _call(loop, lambda: self._handle_loaded(llm))
        finally:
            gc.enable()

    def _handle_loaded(self, llm: LLM) -> None:
        self._service.attach(llm)
        self._service.start_driver()
        self._say(f"ready: {describe_address(self._opened, self._config)}/v1 serves {', '.join(self._service.names)}")

    def _handle_failed_load(self, error: BaseException) -> None:
        self._error = error
        self._finish(1)

    def _handle_signal(self) -> None:
        if self._draining is None:
            self._service.lifecycle.drain()
            count = self._service.admission.num_requests
            if count:
                self._say(
                    f"shutting down: {count} request(s) have {self._config.shutdown_timeout:g} s to finish; a second signal "
                    "ends them immediately"
                )
            self._draining = asyncio.create_task(self._drain())
        else:
            self._service.end_all()
            self._finish(0)

    async def _drain(self) -> None:
        await self._wait_for_requests(self._config.shutdown_timeout)
        if self._service.admission.num_requests:
            self._service.end_all()
            await self._wait_for_requests(_CLOSE_S)
        self._finish(0)

    async def _wait_for_requests(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self._service.admission.num_requests and time.monotonic() < end:
            await asyncio.sleep(_POLL_S)

    def _handle_death(self, loop: asyncio.AbstractEventLoop) -> None:
        self._say("the engine has stopped; the server is shutting down")
        loop.call_later(_GRACE_S, self._finish, DEAD_CODE)

    def _finish(self, code: int) -> None:
        if not self._code.done():
            self._code.set_result(code)


def _call(loop: asyncio.AbstractEventLoop, what: Callable[[], None]) -> None:
    # The loop may have ended while the model was loaded.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(what)
