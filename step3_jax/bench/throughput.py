"""Requests of mixed lengths through `LLM.generate`, next to a replay of its calls and a peer with static batches."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Int

from step3_jax.bench.record import Recording, RecordingExecutor, Replay, call_seconds, replay
from step3_jax.bench.workload import Lengths, random_prompts, word_tokenizer
from step3_jax.cache.paged import Cache
from step3_jax.engine.config import EngineConfig
from step3_jax.engine.executor import Executor
from step3_jax.engine.llm import LLM
from step3_jax.engine.request import RequestOutput
from step3_jax.engine.stats import EngineStats
from step3_jax.sampling.params import SamplingParams

Row = dict[str, str | int | float | None]


class StaticPeer(Protocol):
    """A decoder that runs one batch at a time, all its sequences equally long."""

    def prefill(self, dtype: str, ids: Int[np.ndarray, "B T"], room: int) -> float:
        """Seconds until the first token of each; `room` is the number of tokens that may follow."""

    def decode(self, dtype: str, steps: int) -> float:
        """Seconds of `steps` more tokens for each."""


@dataclasses.dataclass(frozen=True)
class Round:
    """One run of the workload, and the same calls without the engine.

    Attributes:
      engine_s: `LLM.generate`, without compiling.
      replay_s: The same calls of the executor without the engine, dispatched and waited for in the same order.
      compile_s: Compiling inside `LLM.generate`.
      stats: The engine's counts in this round.
      recording: The calls.
    """

    engine_s: float
    replay_s: float
    compile_s: float
    stats: EngineStats
    recording: Recording

    @property
    def overhead(self) -> float:
        """Time with the engine, relative to that without."""
        return self.engine_s / self.replay_s


class Bench:
    """An engine whose calls are recorded. It keeps its compiled programs from round to round."""

    def __init__(self, executor: Executor, config: EngineConfig) -> None:
        """Takes the executor that runs the model.

        Args:
          executor: Executor of a model without images.
          config: The engine's settings.
        """
        self.config = config
        self.vocab_size = executor.config.text.vocab_size
        self.executor = RecordingExecutor(executor)
        # With text, as for users.
        self.llm = LLM.from_model(self.executor, word_tokenizer(self.vocab_size), config=config)
        # The replays' cache, kept like the engine's own: new memory is slower at first.
        self._cache: Cache | None = None

    def generate(self, lengths: Sequence[Lengths], *, seed: int, use_tqdm: bool = False) -> list[RequestOutput]:
        """Runs requests with random prompts; greedy, each to its full length."""
        params = [SamplingParams(temperature=0.0, max_tokens=one.output, ignore_eos=True) for one in lengths]
        return self.llm.generate(random_prompts(lengths, self.vocab_size, seed=seed), params, use_tqdm=use_tqdm)

    def run_round(self, lengths: Sequence[Lengths], *, seed: int) -> tuple[Round, list[RequestOutput], Replay]:
        """Runs requests, then the same calls without the engine."""
        timed, outputs = self._run(lengths, seed=seed)
        replayed = self._replay(timed.recording)
        return dataclasses.replace(timed, replay_s=replayed.seconds), outputs, replayed

    def run_alternating(
        self, lengths: Sequence[Lengths], rounds: int, *, seed: int, after: Callable[[int, Round], None] | None = None
    ) -> list[Round]:
        """Rounds with different prompts in each, after one that does not count.

        The first one after other work is slower, as the machine has to read the weights again. So every second round
        starts with the replay, then of the previous round: the calls differ slightly, as their length depends on
        measured times.

        Args:
          lengths: Lengths of the requests.
          rounds: Rounds; with an even number both sides come first equally often.
          seed: Seed of the prompts.
          after: Called with each round's number and its measurement, for other measurements in the same round.
        """
        last = self.run_round(lengths, seed=seed + rounds)[0].recording
        found = []
        for number in range(rounds):
            if number % 2:
                replay_s = self._replay(last).seconds
                one = dataclasses.replace(self._run(lengths, seed=seed + number)[0], replay_s=replay_s)
            else:
                one = self.run_round(lengths, seed=seed + number)[0]
            last = one.recording
            found.append(one)
            if after is not None:
                after(number, one)
        return found

    def warm_up(self, lengths: Sequence[Lengths], *, seed: int) -> None:
        """Runs requests, so that programs are compiled. Later compiling is subtracted from the time."""
        self.generate(lengths, seed=seed)

    def time_calls(self, recording: Recording) -> list[float]:
        """Seconds of recorded calls, each replayed separately."""
        self._cache, seconds = call_seconds(self.executor, recording, self._take_cache())
        return seconds

    def _run(self, lengths: Sequence[Lengths], *, seed: int) -> tuple[Round, list[RequestOutput]]:
        """A round without its replay."""
        before, compiled = dataclasses.replace(self.llm.stats), self.executor.compile_s
        begin = time.perf_counter()
        with self.executor.record() as recording:
            outputs = self.generate(lengths, seed=seed)
        elapsed, compile_s = time.perf_counter() - begin, self.executor.compile_s - compiled
        stats = _difference(self.llm.stats, before)
        return Round(elapsed - compile_s, 0.0, compile_s, stats, recording), outputs

    def _replay(self, recording: Recording) -> Replay:
        replayed = replay(self.executor, recording, self._take_cache())
        self._cache = replayed.cache
        return replayed

    def _take_cache(self) -> Cache:
        """The replays' cache, for a call that consumes it."""
        cache, self._cache = self._cache, None
        return self.executor.new_cache() if cache is None else cache


def measure_throughput(
    bench: Bench,
    lengths: Sequence[Lengths],
    *,
    rounds: int,
    peer: StaticPeer | None = None,
    peer_dtypes: Sequence[str] = (),
    seed: int = 0,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, object]:
    """Engine, replay and peer in turn, each once per round.

    Args:
      bench: The engine.
      lengths: Lengths of the requests.
      rounds: Rounds; figures are medians over them.
      peer: Runs the same requests in batches of `max_num_seqs` in their order, prompts padded to the longest of the batch,
        until the longest output of the batch has ended; its numbers count the requested tokens, not the padding.
      peer_dtypes: Dtypes of the peer's weights.
      seed: Seed of the prompts.
      tell: Gets a line of text about each part before it is measured.

    Returns:
      `requests`, `rounds` and, for each side, a row in `throughput`, as JSON takes them.
    """
    peer_s: dict[str, list[float]] = {name: [] for name in peer_dtypes}

    def measure_peer(number: int, one: Round) -> None:
        place = f"throughput: round {number + 1} of {rounds}:"
        tell(f"{place} engine {one.engine_s:.2f} s, replay {one.replay_s:.2f} s")
        if peer is None:
            return
        for name, seconds in peer_s.items():
            seconds.append(run_static(peer, name, lengths, bench.config.max_num_seqs, bench.vocab_size))
            tell(f"{place} PyTorch in {name} {seconds[-1]:.2f} s")

    tell("throughput: compiling ...")
    bench.warm_up(lengths, seed=seed + rounds + 1)
    found = bench.run_alternating(lengths, rounds, seed=seed, after=measure_peer)
    engine_s = statistics.median(one.engine_s for one in found)
    stats, calls = found[-1].stats, found[-1].recording
    rows: list[Row] = [_rates("engine", lengths, engine_s)]
    rows.append(_rates("replay", lengths, statistics.median(one.replay_s for one in found)))
    rows += [_rates(f"torch {name}", lengths, statistics.median(times)) for name, times in peer_s.items()]
    times_peer = {
        name: statistics.median(theirs / ours.engine_s for theirs, ours in zip(times, found, strict=True))
        for name, times in peer_s.items()
    }
    return {
        "requests": {
            "count": len(lengths),
            "prompt_tokens": sum(one.prompt for one in lengths),
            "output_tokens": sum(one.output for one in lengths),
            "longest_prompt": max(one.prompt for one in lengths),
            "longest_output": max(one.output for one in lengths),
        },
        "engine_overhead": statistics.median(one.overhead for one in found),
        "times_torch": times_peer,
        "counts": {
            "preemptions": stats.num_preemptions,
            "prefix_cache_queries": stats.prefix_cache_queries,
            "prefix_cache_hits": stats.prefix_cache_hits,
            "chunks": calls.num_prefills,
            "decode_calls": calls.num_decodes,
        },
        "throughput": rows,
        "rounds": [
            {
                "engine_s": one.engine_s,
                "replay_s": one.replay_s,
                "overhead": one.overhead,
                "compile_s": one.compile_s,
            }
            | {f"torch_{name}_s": times[number] for name, times in peer_s.items()}
            for number, one in enumerate(found)
        ],
    }


def run_static(peer: StaticPeer, dtype: str, lengths: Sequence[Lengths], batch_size: int, vocab_size: int) -> float:
    """Seconds of requests in batches that each wait for their longest sequence; prompts are padded to the longest."""
    rng = np.random.default_rng(0)
    seconds = 0.0
    for first in range(0, len(lengths), batch_size):
        batch = lengths[first : first + batch_size]
        steps = max(one.output for one in batch)
        # The contents of the padding do not affect the time.
        ids = rng.integers(2, vocab_size, (len(batch), max(one.prompt for one in batch)))
        seconds += peer.prefill(dtype, ids, steps)
        if steps > 1:
            seconds += peer.decode(dtype, steps - 1)
    return seconds


def _rates(side: str, lengths: Sequence[Lengths], seconds: float) -> Row:
    return {
        "side": side,
        "seconds": seconds,
        "requests_per_s": len(lengths) / seconds,
        "prompt_tokens_per_s": sum(one.prompt for one in lengths) / seconds,
        "generated_tokens_per_s": sum(one.output for one in lengths) / seconds,
    }


def _difference(after: EngineStats, before: EngineStats) -> EngineStats:
    # Fields that are not plain numbers, or unknown to most executors.
    others = ("expert_tokens", "num_accepted_tokens_per_pos", "afd_wait_s")
    names = [field.name for field in dataclasses.fields(EngineStats) if field.name not in others]
    return EngineStats(**{name: getattr(after, name) - getattr(before, name) for name in names})
