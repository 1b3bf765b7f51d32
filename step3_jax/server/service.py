"""What all endpoints share: the model, its driver, limits, metrics, and threads for work that would block the event loop."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
from collections.abc import Callable, Mapping
from typing import ParamSpec, Protocol, TypeVar

from pydantic import BaseModel

from step3_jax.engine.llm import LLM
from step3_jax.server.admission import Admission
from step3_jax.server.config import ServerConfig
from step3_jax.server.driver import Driver
from step3_jax.server.error import ApiError, unavailable, unknown_names
from step3_jax.server.fetch import MediaFetcher
from step3_jax.server.lifecycle import Lifecycle
from step3_jax.server.media import MediaLimits, MediaReader
from step3_jax.server.metric import Metrics

_LOG = logging.getLogger(__name__)
# Threads for templates, tokenising and images.
NUM_THREADS = 4
# Separate, as a grammar may take seconds: others' prompts must not wait for it.
NUM_GRAMMAR_THREADS = 2
# Without a limit the queue holds this many times what runs at once.
QUEUE_FACTOR = 4
# Unknown field names to remember, so that each is logged once.
_MAX_UNKNOWN = 1000

P = ParamSpec("P")
R = TypeVar("R")


class Interruptible(Protocol):
    """Work in progress that can be ended."""

    def interrupt(self, error: Exception) -> None: ...


class Service:
    """One server's state.

    Attributes:
      config: The settings.
      names: Names of the model in requests; the first is in answers.
      lifecycle: What the server is doing.
      metrics: Counts and histograms.
      admission: Counts what runs and waits.
      pool: Threads.
      generations: Work in progress.
      media: Reads images of messages.
    """

    def __init__(self, config: ServerConfig) -> None:
        """Starts without a model; see `attach`."""
        self.config = config
        self.names = config.served_model_name or ("step3",)
        self.lifecycle = Lifecycle()
        self.metrics = Metrics(self.names[0], prefix=config.metrics_prefix)
        self.admission = Admission(1, None)
        self.pool = concurrent.futures.ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="step3-request")
        self._grammar_pool = concurrent.futures.ThreadPoolExecutor(
            NUM_GRAMMAR_THREADS, thread_name_prefix="step3-grammar"
        )
        self.generations: set[Interruptible] = set()
        domains = config.allowed_media_domains
        limits = MediaLimits(config.max_images, config.max_image_pixels, config.max_image_bytes)
        self.media = MediaReader(limits, fetcher=MediaFetcher(domains) if domains else None, pool=self.pool)
        self._llm: LLM | None = None
        self._driver: Driver | None = None
        self._on_death: Callable[[], None] = lambda: None
        self._unknown: set[str] = set()

    def attach(self, llm: LLM) -> None:
        """Takes the model; requests are answered from now on. Nothing else may use it."""
        self._llm = llm
        limit = self.config.max_num_queued_reqs or QUEUE_FACTOR * llm.engine_config.max_num_seqs
        self.admission = Admission(limit, self.config.max_num_queued_tokens, self.metrics.count_rejection)
        self.metrics.watch(llm)
        self.lifecycle.become_ready()

    @property
    def llm(self) -> LLM:
        """The model.

        Raises:
          ApiError: 503, while it is loaded.
        """
        if self._llm is None:
            raise unavailable("not_ready", "the model is being loaded: try again a little later")
        return self._llm

    @property
    def driver(self) -> Driver:
        """The engine's driver, started with the first request at the latest. Only for the event loop."""
        if self._driver is None:
            self.start_driver()
        assert self._driver is not None
        return self._driver

    def start_driver(self) -> None:
        """Starts the engine's driver, in the event loop; before the first request, so that it notices a lost process."""
        limit = self.config.max_num_queued_reqs or QUEUE_FACTOR * self.llm.engine_config.max_num_seqs
        self._driver = Driver(
            self.llm,
            asyncio.get_running_loop(),
            max_waiting=limit,
            on_death=self._die,
            on_step=self.metrics.observe_step,
            on_refused=self.metrics.count_rejection,
        )
        self._driver.start()

    @property
    def is_stalled(self) -> bool:
        """Whether the engine has work but makes no progress."""
        return self._driver is not None and self._driver.is_stalled(self.config.stall_seconds)

    def on_death(self, call: Callable[[], None]) -> None:
        """Callback, in the event loop, for when the engine's thread has died from an error."""
        self._on_death = call

    def end_all(self) -> None:
        """Ends all generation, each with an error for its client."""
        for generation in tuple(self.generations):
            generation.interrupt(unavailable("shutting_down", "the server is shutting down, and ended the request"))

    def close(self, timeout_s: float | None = None) -> bool:
        """Ends the threads; returns whether the engine's has ended in time."""
        for pool in (self.pool, self._grammar_pool):
            pool.shutdown(wait=False, cancel_futures=True)
        return self._driver is None or self._driver.stop(timeout_s)

    async def call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Calls a function in one of the threads."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, lambda: function(*args, **kwargs))

    async def compile(self, function: Callable[[], R]) -> R:
        """Calls a function that compiles a grammar, in a dedicated thread."""
        return await asyncio.get_running_loop().run_in_executor(self._grammar_pool, function)

    def choose_name(self, wanted: str | None) -> str:
        """The model's name in an answer.

        Args:
          wanted: Its name in the request; None or "" for the first.

        Raises:
          ApiError: 404, if it is not one of the model's.
        """
        if not wanted:
            return self.names[0]
        if wanted not in self.names:
            raise ApiError(
                404,
                f"there is no model {wanted[:200]!r}; this server has {', '.join(self.names)}",
                param="model",
                code="model_not_found",
            )
        return wanted

    def note_unknown(self, body: Mapping[str, object], model: type[BaseModel], log_id: str) -> None:
        """Logs each unknown field once, with the id of the first request that has it."""
        for name in unknown_names(body, model):
            if name not in self._unknown and len(self._unknown) < _MAX_UNKNOWN:
                self._unknown.add(name)
                _LOG.info("request %s has the unknown field %.80r, which is ignored", log_id, name)

    def _die(self) -> None:
        self.lifecycle.die()
        self._on_death()
