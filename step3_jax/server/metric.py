"""Metrics in Prometheus' format, with vLLM's names after a prefix.

A scrape reads numbers that the engine's thread writes, and takes no lock.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pallas_kernels.storage import PAGE_SIZE
from step3_jax.engine.llm import LLM
from step3_jax.engine.stats import EngineStats
from step3_jax.server.driver import StepRecord

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# vLLM's buckets, so that its dashboards read them.
_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0),
    *(80.0, 160.0, 640.0, 2560.0),
)
_PER_TOKEN = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0),
    *(960.0, 1920.0, 7680.0),
)
_ITERATION = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_COUNT = (1, 2, 5, 10, 20)
_STEPS = (1, 2, 4, 8, 16, 32)
_LABELS = ("model_name", "engine")
_ENGINE = "0"


@dataclasses.dataclass
class RequestRecord:
    """How a request went, on `time.monotonic`.

    Attributes:
      arrived_s: When its prompt was submitted.
      num_prompt_tokens: Tokens of the prompt, including image places.
      n: Number of completions.
      max_tokens: The limit of each, as requested; None if not given.
      num_cached_tokens: Prompt tokens from the prefix cache.
      num_generated_tokens: Tokens of all completions.
      admitted_s: When it got a slot.
      first_token_s: When the first token was ready.
      last_token_s: When the last one was.
      finish_reasons: Finish reasons of its completions: stop, length, abort, error.
    """

    arrived_s: float
    num_prompt_tokens: int
    n: int
    max_tokens: int | None
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    admitted_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    finish_reasons: Sequence[str] = ()


class Metrics:
    """Counts and histograms of one server."""

    def __init__(self, model_name: str, *, prefix: str = "step3", max_model_len: int = 65536) -> None:
        """Creates its own registry, so that a process may have several servers.

        Args:
          model_name: Value of the label `model_name`.
          prefix: Prefix of all names.
          max_model_len: The longest request, for the buckets.
        """
        self.registry = CollectorRegistry(auto_describe=True)
        self._prefix = prefix
        self._values = (model_name, _ENGINE)
        lengths = _build_lengths(max_model_len)
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token.", _FIRST_TOKEN
        )
        self._between = self._histogram("inter_token_latency_seconds", "Between tokens.", _PER_TOKEN)
        self._per_token = self._histogram(
            "request_time_per_output_token_seconds", "A request's mean between tokens.", _PER_TOKEN
        )
        self._whole = self._histogram("e2e_request_latency_seconds", "From a request's arrival to its end.", _REQUEST)
        self._queue = self._histogram("request_queue_time_seconds", "Waiting for a slot.", _REQUEST)
        self._inference = self._histogram("request_inference_time_seconds", "With a slot.", _REQUEST)
        self._prefill = self._histogram("request_prefill_time_seconds", "From the slot to the first token.", _REQUEST)
        self._decode = self._histogram("request_decode_time_seconds", "From the first token to the last.", _REQUEST)
        self._prompt = self._histogram("request_prompt_tokens", "Tokens of prompts.", lengths)
        self._generation = self._histogram("request_generation_tokens", "Tokens generated for a request.", lengths)
        self._max_tokens = self._histogram("request_params_max_tokens", "Requested max_tokens.", lengths)
        self._n = self._histogram("request_params_n", "Requested n.", _COUNT)
        self._iteration = self._histogram(
            "iteration_tokens_total", "Tokens prefilled or generated in a step.", _ITERATION
        )
        self._grammar = self._histogram(
            "grammar_compile_seconds", "Compiling the grammar of a structured output.", _REQUEST
        )
        self._step = self._histogram("engine_step_seconds", "Seconds of a step of the engine.", _PER_TOKEN)
        self._decode_steps = self._histogram("decode_steps_per_call", "Tokens per sequence of a decode call.", _STEPS)
        self._success = self._counter("request_success", "Completions that ended, by finish reason.", "finished_reason")
        self._rejections = self._counter("admission_rejections", "Requests that were rejected.", "reason")
        self._disconnects = self._counter(
            "http_requests_client_disconnected", "Clients that disconnected before the end."
        )
        self._tool_calls = self._counter("tool_call_parser_invocations", "Answers that were parsed for tool calls.")
        for reason in ("stop", "length", "abort", "error"):
            self._success.labels(*self._values, reason)

    def watch(self, llm: LLM) -> None:
        """Adds the engine's own numbers."""
        self.registry.register(_EngineCollector(llm, self._prefix, self._values))

    def render(self) -> bytes:
        """All metrics as text."""
        return generate_latest(self.registry)

    def observe_step(self, step: StepRecord) -> None:
        """Takes a step of the engine, in its thread."""
        self._step.labels(*self._values).observe(step.seconds)
        if step.num_tokens:
            self._iteration.labels(*self._values).observe(step.num_tokens)
        if step.num_decode_steps:
            self._decode_steps.labels(*self._values).observe(step.num_decode_steps)

    def observe_grammar(self, seconds: float) -> None:
        """Takes how long compiling a structured output took."""
        self._grammar.labels(*self._values).observe(seconds)

    def observe_tokens(self, seconds: float, count: int) -> None:
        """Takes tokens that came `seconds` after the previous ones."""
        histogram = self._between.labels(*self._values)
        for _ in range(count):
            histogram.observe(seconds / count)

    def observe_request(self, record: RequestRecord, now: float) -> None:
        """Takes a request that has ended, at `now` on `time.monotonic`."""
        values = self._values
        for reason in record.finish_reasons:
            self._success.labels(*values, reason).inc()
        self._prompt.labels(*values).observe(record.num_prompt_tokens)
        self._generation.labels(*values).observe(record.num_generated_tokens)
        self._n.labels(*values).observe(record.n)
        if record.max_tokens is not None:
            self._max_tokens.labels(*values).observe(record.max_tokens)
        self._whole.labels(*values).observe(now - record.arrived_s)
        if record.admitted_s is not None:
            self._queue.labels(*values).observe(max(0.0, record.admitted_s - record.arrived_s))
            self._inference.labels(*values).observe(now - record.admitted_s)
        if record.first_token_s is None or record.last_token_s is None:
            return
        self._first_token.labels(*values).observe(record.first_token_s - record.arrived_s)
        if record.admitted_s is not None:
            self._prefill.labels(*values).observe(max(0.0, record.first_token_s - record.admitted_s))
        decode_s = record.last_token_s - record.first_token_s
        self._decode.labels(*values).observe(decode_s)
        following = record.num_generated_tokens - record.n
        if following > 0:
            self._per_token.labels(*values).observe(decode_s * record.n / following)

    def count_rejection(self, reason: str) -> None:
        """Counts a request that was not admitted."""
        self._rejections.labels(*self._values, reason).inc()

    def count_disconnect(self) -> None:
        """Counts a client that disconnected before the end."""
        self._disconnects.labels(*self._values).inc()

    def count_tool_parse(self) -> None:
        """Counts an answer that was parsed for calls."""
        self._tool_calls.labels(*self._values).inc()

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        made = Histogram(f"{self._prefix}:{name}", text, _LABELS, registry=self.registry, buckets=buckets)
        made.labels(*self._values)
        return made

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        made = Counter(f"{self._prefix}:{name}", text, (*_LABELS, *labels), registry=self.registry)
        if not labels:
            made.labels(*self._values)
        return made


class _EngineCollector(Collector):
    """Reads the engine at each scrape."""

    def __init__(self, llm: LLM, prefix: str, values: Sequence[str]) -> None:
        self._llm, self._prefix, self._values = llm, prefix, tuple(values)

    def collect(self) -> Iterable[Metric]:
        core, stats = self._llm.core, self._llm.stats
        allocator = core.allocator
        gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "num_requests_running": ("Sequences with a slot.", lambda: core.num_running),
            "num_requests_waiting": (
                "Sequences that wait for a slot, each of a request's n.",
                lambda: core.num_waiting,
            ),
            "kv_cache_usage_perc": (
                "Pages of running sequences, 0 to 1.",
                lambda: 1 - allocator.num_free / allocator.num_pages,
            ),
        }
        for name, (text, read) in gauges.items():
            yield self._family(GaugeMetricFamily, name, text, read())
        waiting = GaugeMetricFamily(
            f"{self._prefix}:num_requests_waiting_by_reason",
            "Sequences that wait: for capacity, or deferred until another one of their request has prefilled the prompt.",
            labels=(*_LABELS, "reason"),
        )
        num_waiting, num_queued = core.num_waiting, core.scheduler.num_waiting
        waiting.add_metric((*self._values, "capacity"), min(num_waiting, num_queued))
        waiting.add_metric((*self._values, "deferred"), max(0, num_waiting - num_queued))
        yield waiting
        counters: dict[str, tuple[str, float]] = {
            "prompt_tokens": ("Tokens of prompts that were prefilled or cached.", stats.num_prompt_tokens),
            "prompt_tokens_cached": ("Tokens of prompts that were cached.", stats.prefix_cache_hits),
            "generation_tokens": ("Tokens generated, those of aborted requests too.", stats.num_generated_tokens),
            "num_preemptions": ("Sequences that were preempted.", stats.num_preemptions),
            "prefix_cache_queries": ("Prompt tokens looked up in the prefix cache.", stats.prefix_cache_queries),
            "prefix_cache_hits": ("Prompt tokens found in the prefix cache.", stats.prefix_cache_hits),
            "mm_cache_queries": ("Images of prompts.", stats.num_images),
            "mm_cache_hits": ("Images of prompts whose features were known.", stats.num_known_images),
            "compilations": ("Programs that were traced, and compiled or found in the cache.", stats.num_compilations),
            "compile_seconds": ("Seconds of compiling.", stats.compile_s),
            "decode_call_seconds": ("Seconds of decode calls.", stats.decode_s),
            "mask_seconds": ("Seconds of filling masks of structured outputs.", stats.mask_s),
            "image_encode_seconds": ("Seconds of the vision tower.", stats.image_encode_s),
        }
        for name, (text, value) in counters.items():
            yield self._family(CounterMetricFamily, name, text, value)
        if self._llm.engine_config.speculation is not None:
            yield from self._speculation(stats)
        if stats.afd_wait_s is not None:
            text = "Seconds that attention waited for the FFN side."
            yield self._family(CounterMetricFamily, "afd_wait_seconds", text, stats.afd_wait_s)
        load = GaugeMetricFamily(
            f"{self._prefix}:expert_load",
            "Prompt tokens of the busiest expert over the mean of all, by MoE layer.",
            labels=(*_LABELS, "layer"),
        )
        for layer, value in enumerate(stats.expert_load):
            load.add_metric((*self._values, str(layer)), value)
        yield load
        config = self._llm.engine_config.to_dict() | {"num_gpu_blocks": allocator.num_pages, "block_size": PAGE_SIZE}
        labels = {name: str(value) for name, value in config.items()}
        info = GaugeMetricFamily(
            f"{self._prefix}:cache_config_info", "The engine's settings.", labels=("engine", *labels)
        )
        info.add_metric((_ENGINE, *labels.values()), 1)
        yield info

    def _speculation(self, stats: EngineStats) -> Iterable[Metric]:
        """Counts of guessed tokens, under vLLM's names; present only with speculation."""
        counters = {
            "spec_decode_num_drafts": ("Steps of sequences with guessed tokens.", stats.num_drafts),
            "spec_decode_num_draft_tokens": ("Tokens guessed.", stats.num_draft_tokens),
            "spec_decode_num_accepted_tokens": ("Those that were right.", stats.num_accepted_tokens),
        }
        for name, (text, value) in counters.items():
            yield self._family(CounterMetricFamily, name, text, value)
        by_place = CounterMetricFamily(
            f"{self._prefix}:spec_decode_num_accepted_tokens_per_pos",
            "Guessed tokens that were right, by their place.",
            labels=(*_LABELS, "position"),
        )
        for place, value in enumerate(stats.num_accepted_tokens_per_pos):
            by_place.add_metric((*self._values, str(place)), value)
        yield by_place

    def _family(
        self, kind: type[GaugeMetricFamily] | type[CounterMetricFamily], name: str, text: str, value: float
    ) -> Metric:
        family = kind(f"{self._prefix}:{name}", text, labels=_LABELS)
        family.add_metric(self._values, value)
        return family


def _build_lengths(most: int) -> list[float]:
    """1, 2, 5, 10, ... up to `most`."""
    found: list[float] = []
    scale = 1
    while True:
        for step in (1, 2, 5):
            if step * scale > most:
                return found or [1]
            found.append(step * scale)
        scale *= 10
