"""How cost grows with sequences, with the length of a prompt, and with the number of requests."""

from __future__ import annotations

import gc
import itertools
import statistics
import threading
import time
from collections.abc import Callable, Sequence

from step3_jax.bench.machine import anonymous_bytes
from step3_jax.bench.throughput import Bench, Row
from step3_jax.bench.workload import Lengths

# How often memory is sampled while requests run.
_SAMPLE_S = 0.05


def measure_sequences(
    make_bench: Callable[[int], Bench],
    counts: Sequence[int],
    each: Lengths,
    *,
    rounds: int,
    tell: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """As many equal requests as run at once, and a replay of their calls.

    Args:
      make_bench: Makes an engine for this many sequences.
      counts: Sequences.
      each: Tokens of each.
      rounds: Rounds; figures are medians over them.
      tell: Called with a line of text about each part before it is measured.
    """
    rows: list[Row] = []
    for count in counts:
        tell(f"scaling: {count} sequences ...")
        bench = make_bench(count)
        bench.warm_up([each] * count, seed=rounds + 1)
        found = bench.run_alternating([each] * count, rounds, seed=0)
        seconds = statistics.median(one.engine_s for one in found)
        rows.append(
            {
                "sequences": count,
                "seconds": seconds,
                "generated_tokens_per_s": count * each.output / seconds,
                "ms_per_generated_token": seconds / (count * each.output) * 1e3,
                "preemptions": max(one.stats.num_preemptions for one in found),
                "engine_overhead": statistics.median(one.overhead for one in found),
                # The engine's overhead: its time without that of its calls.
                "engine_ms_per_call": statistics.median(
                    (one.engine_s - one.replay_s) / max(1, one.recording.num_decodes) * 1e3 for one in found
                ),
            }
        )
    return rows


def measure_prompts(
    bench: Bench, lengths: Sequence[int], *, rounds: int, tell: Callable[[str], None] = lambda _: None
) -> list[Row]:
    """One prompt at a time, with one token of output.

    Args:
      bench: The engine.
      lengths: Tokens of the prompts.
      rounds: Rounds; figures are medians over them.
      tell: Called with a line of text about each part before it is measured.
    """
    rows: list[Row] = []
    for length in lengths:
        tell(f"scaling: a prompt of {length} tokens ...")
        bench.warm_up([Lengths(length, 1)], seed=rounds + 1)
        found = bench.run_alternating([Lengths(length, 1)], rounds, seed=0)
        seconds = statistics.median(one.engine_s for one in found)
        rows.append(
            {
                "prompt_tokens": length,
                "chunks": found[-1].recording.num_prefills,
                "seconds": seconds,
                "prompt_tokens_per_s": length / seconds,
                "engine_overhead": statistics.median(one.overhead for one in found),
            }
        )
    return rows


def measure_memory(
    bench: Bench,
    lengths: Sequence[Lengths],
    *,
    counts: Sequence[int],
    warm_up: int,
    tell: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Memory after requests have run and their outputs are dropped.

    Args:
      bench: The engine.
      lengths: Lengths of the requests, used cyclically.
      counts: Requests of each call of `generate`, one after the other.
      warm_up: Requests before all of these: the programs that they compile are in all readings.
      tell: Called with a line of text about each part before it is measured.

    Returns:
      A row for each call: anonymous memory in MiB after it, and the peak while it ran (None if the system does not say),
      and the programs that it compiled, which stay in memory.
    """
    tell(f"scaling: {warm_up} requests that do not count ...")
    bench.generate(_cycle(lengths, warm_up), seed=len(counts))
    rows: list[Row] = []
    for number, count in enumerate(counts):
        tell(f"scaling: {count} requests ...")
        num_programs = sum(bench.executor.num_traces.values())
        with _Peak() as peak:
            begin = time.perf_counter()
            bench.generate(_cycle(lengths, count), seed=number, use_tqdm=True)
            seconds = time.perf_counter() - begin
        gc.collect()
        rows.append(
            {
                "requests": count,
                "seconds": seconds,
                "requests_per_s": count / seconds,
                "anonymous_mib_after": _mib(anonymous_bytes()),
                "anonymous_mib_most": _mib(peak.most),
                "programs_compiled": sum(bench.executor.num_traces.values()) - num_programs,
            }
        )
    return rows


def _cycle(lengths: Sequence[Lengths], count: int) -> list[Lengths]:
    return list(itertools.islice(itertools.cycle(lengths), count))


class _Peak:
    """The peak of anonymous memory inside, sampled from another thread."""

    def __init__(self) -> None:
        self.most: int | None = None
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> _Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            now = anonymous_bytes()
            if now is not None:
                self.most = max(self.most or 0, now)
            if self._is_over.wait(_SAMPLE_S):
                return


def _mib(num_bytes: int | None) -> float | None:
    return None if num_bytes is None else num_bytes / 2**20
